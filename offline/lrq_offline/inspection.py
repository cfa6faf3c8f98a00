"""What is inside an LRQ checkpoint, read from its files."""

from dataclasses import dataclass
from pathlib import Path

from lrq_vllm.checkpoint.packing import unpack
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors, read_manifest
from lrq_vllm.tensor_parallel import sizes_in_words

__all__ = ["CheckpointSummary", "LayerSummary", "inspect_checkpoint"]


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer. at_bounds: share of integers that lie on the ends of the grid."""

    module: str
    out_features: int
    in_features: int
    bits: int
    steps: int
    step_min: float
    step_max: float
    at_bounds: float
    stored_bytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """Lines about the whole, and a row for each quantized layer."""

    headline: tuple[str, ...]
    layers: tuple[LayerSummary, ...]


def inspect_checkpoint(folder: Path) -> CheckpointSummary:
    """Check a checkpoint's tensors and summarise them. Raises CheckpointError or ModelFolderError if it is damaged."""
    manifest, tensors = read_manifest(folder), TensorFolder(folder)
    check_tensors(tensors, manifest)
    layers = tuple(_layer(module, manifest, tensors) for module in manifest.quantized)
    weight, activation = manifest.weight, manifest.activation
    granularity = "per channel" if weight.group_size is None else f"per group of {weight.group_size}"
    inputs = "16-bit"
    if activation is not None:
        inputs = f"{activation.bits}-bit, {'static per tensor' if activation.static else 'dynamic per token'}"
        inputs += ", clipped" if activation.symmetric else ""
    correction, hadamard = manifest.correction, manifest.online_hadamard
    ranks = [] if correction is None else sorted(set(correction.rank.values()))
    corrected = "none"
    if correction is not None:
        between = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        corrected = f"{between} for {len(correction.rank)} layers, {manifest.correction_bytes:,} bytes"
    rotated = "none"
    if hadamard is not None:
        rotated = f"{len(hadamard.modules)} inputs while serving, {hadamard.block} values together"
    return CheckpointSummary(
        headline=(
            f"scheme       {manifest.scheme} (written by lrq {manifest.tool_version})",
            f"weights      {weight.bits}-bit {granularity}, {'symmetric' if weight.symmetric else 'asymmetric'}",
            f"activations  {inputs}",
            f"correction   {corrected}",
            f"rotations    {rotated}",
            f"kv cache     {manifest.kv_bits or 16}-bit",
            f"serves on    {sizes_in_words(manifest.tensor_parallel_sizes)}",
            f"quantized    {len(layers)} linear layers, {sum(layer.stored_bytes for layer in layers):,} bytes",
            f"left as is   {', '.join(manifest.skipped) or 'none'}",
        ),
        layers=layers,
    )


def _layer(module: str, manifest: Manifest, tensors: TensorFolder) -> LayerSummary:
    out_features, in_features = manifest.quantized[module]
    names = [f"{module}.{suffix}" for suffix in manifest.tensors_of(module)]
    bits = manifest.weight.bits
    q = unpack(tensors.get(f"{module}.qweight"), bits, in_features)
    step = tensors.get(f"{module}.weight_step")
    return LayerSummary(
        module=module,
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        steps=step.numel(),
        step_min=step.min().item(),
        step_max=step.max().item(),
        at_bounds=((q == 0) | (q == 2**bits - 1)).float().mean().item(),
        stored_bytes=sum(tensors.get(name).nbytes for name in names),
    )
