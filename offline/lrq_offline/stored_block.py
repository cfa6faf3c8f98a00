"""A quantized block as the tensors of one shard, and back."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lrq_offline.affine import activation_quantizer
from lrq_offline.input_rotation import InputRotation
from lrq_offline.learned_scales import FixedRounding
from lrq_offline.quantized_block import FakeQuantizedLinear, quantized_linear, replace_linears
from lrq_vllm.checkpoint.affine import StepAndZeroPoint
from lrq_vllm.checkpoint.correction import LOW_RANK_SUFFIXES
from lrq_vllm.checkpoint.packing import pack, unpack
from lrq_vllm.checkpoint.schema import Manifest

__all__ = ["block_tensors", "restore_block"]


def block_tensors(
    block: nn.Module,
    name: str,
    manifest: Manifest,
    ranges: Mapping[str, StepAndZeroPoint],
    clips: Mapping[str, Tensor],
    source_dtype: Callable[[str], torch.dtype],
) -> dict[str, Tensor]:
    """Full tensor name -> tensor, for the quantized ``block`` called ``name``.

    ranges, clips: static input quantizers, and clipping ratios of inputs, by layer. A layer that could not be corrected,
    although the manifest says so, gets factors of zeros. What is not quantized keeps the dtype that ``source_dtype`` says.
    """
    quantized = {module: linear for module, linear in block.named_modules() if isinstance(linear, FakeQuantizedLinear)}
    tensors = {}
    for key, tensor in block.state_dict().items():
        module, _, parameter = key.rpartition(".")
        if module.removesuffix(".rounding") not in quantized or parameter == "bias":
            tensors[f"{name}.{key}"] = tensor.to(source_dtype(f"{name}.{key}"))
    for module, linear in quantized.items():
        q, (step, zero_point) = linear.rounding.quantized()
        stored = {
            "qweight": pack(q, manifest.weight.bits),
            "weight_step": step,
            "weight_zero_point": zero_point.to(torch.uint8),
        }
        if module in ranges:
            # Clones: the layers of a group share these, and safetensors wants a tensor of its own for each name.
            stored["input_step"] = ranges[module].step.clone()
            stored["input_zero_point"] = ranges[module].zero_point.to(torch.uint8)
        if module in clips:
            stored["input_clip"] = clips[module].clone()
        specs = manifest.tensors_of(f"{name}.{module}")
        for suffix, factor in zip(LOW_RANK_SUFFIXES, (linear.low_rank_u, linear.low_rank_v), strict=True):
            if suffix in specs:
                stored[suffix] = torch.zeros(specs[suffix].shape, dtype=specs[suffix].dtype) if factor is None else factor
        for suffix, spec in specs.items():
            assert (stored[suffix].dtype, tuple(stored[suffix].shape)) == (spec.dtype, spec.shape), (module, suffix)
            tensors[f"{name}.{module}.{suffix}"] = stored[suffix]
    return tensors


def restore_block(block: nn.Module, name: str, manifest: Manifest, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Make a float ``block`` the quantized one whose :func:`block_tensors` are ``tensors``, in place."""
    device = next(block.parameters()).device
    roundings, activations, factors, rest = {}, {}, {}, {}
    quantized = [module.removeprefix(f"{name}.") for module in manifest.quantized if module.startswith(f"{name}.")]
    for module in quantized:
        stored = {suffix: tensors[f"{name}.{module}.{suffix}"].to(device) for suffix in manifest.tensors_of(f"{name}.{module}")}
        in_features = manifest.quantized[f"{name}.{module}"][1]
        q = unpack(stored["qweight"], manifest.weight.bits, in_features)
        quantizer = StepAndZeroPoint(stored["weight_step"], stored["weight_zero_point"].float())
        roundings[module] = FixedRounding(q, quantizer, dtype)
        static = StepAndZeroPoint(stored["input_step"], stored["input_zero_point"].float()) if "input_step" in stored else None
        activations[module] = activation_quantizer(manifest.activation, static, stored.get("input_clip"))
        if all(suffix in stored for suffix in LOW_RANK_SUFFIXES):
            factors[module] = [stored[suffix] for suffix in LOW_RANK_SUFFIXES]
    for key, parameter in block.named_parameters():
        if f"{name}.{key}" in tensors:
            rest[key] = tensors[f"{name}.{key}"].to(device=device, dtype=parameter.dtype)
    block.load_state_dict(rest, strict=False, assign=True)
    replace_linears(block, roundings, activations)
    for module, (u, v) in factors.items():
        quantized_linear(block, module).correct(u, v, dtype)
    rotation = InputRotation.of(manifest, name)
    if rotation is not None:
        rotation.install(block)
