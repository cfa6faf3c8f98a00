"""The manifest of a run's result, from the model's config and the settings alone: what cannot be done is found here."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from torch import nn
from transformers import PreTrainedConfig

from lrq_offline.compute import served_in
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES, Family, block_families, empty_model
from lrq_offline.parallel_sizes import tensor_parallel_sizes
from lrq_offline.rotation import rotation_of
from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.schema import Manifest, undivided_layers
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["manifest_of"]


def manifest_of(config: PreTrainedConfig, settings: QuantizeSettings) -> Manifest:
    """The manifest of the result.

    Raises SettingsError before any work if the group size does not divide a layer's inputs, a correction's rank is above a
    layer's, experts have no kernel for the scheme, or the model cannot be rotated.
    """
    _check_experts(config, settings)
    family, blocks, model = FAMILIES[config.model_type], block_families(config), empty_model(config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = [f"{block}.{linear}" for block, own in blocks.items() for linear in own.linears]
    quantized = {name: (linears[name].out_features, linears[name].in_features) for name in modules}
    skipped = [name for name in linears if name not in quantized]
    skipped += [f"{block}.{own.experts.router}" for block, own in blocks.items() if own.experts is not None]
    problems = [] if settings.group_size is None else undivided_layers(settings.group_size, quantized)
    if problems:
        raise SettingsError(one_paragraph(problems, "Choose a --group-size that divides all of them, or leave it out."))
    hadamard = _online_hadamard(config, family, settings, modules)
    sizes = tensor_parallel_sizes(config, settings.weight_format, quantized, hadamard)
    return Manifest(
        settings.scheme, settings.weight_format, quantized, tuple(skipped), version("lrq"), settings.kv_bits, sizes,
        _correction(config, settings, quantized), hadamard,
    )  # fmt: skip


def _check_experts(config: PreTrainedConfig, settings: QuantizeSettings) -> None:
    """Raises SettingsError for what no server computes for experts."""
    clips = settings.bits.activation is not None and settings.bits.activation.symmetric
    if FAMILIES[config.model_type].experts is not None and (settings.corrects or clips):
        what = "a low-rank correction (--correction-rank)" if settings.corrects else settings.scheme
        raise SettingsError(
            f"This {config.model_type} model has experts, which go without {what}: no kernel computes it for them. "
            "Choose another scheme, such as w4a8, without --correction-rank."
        )


def _correction(
    config: PreTrainedConfig, settings: QuantizeSettings, quantized: Mapping[str, tuple[int, int]]
) -> Correction | None:
    """Raises SettingsError for a rank above a layer's."""
    if not settings.corrects:
        return None
    ranks = {name: settings.correction_rank_of(shape) for name, shape in quantized.items()}
    problems = [f"{name} has ranks up to {min(quantized[name])}" for name, k in ranks.items() if k > min(quantized[name])]
    if problems:
        raise SettingsError(
            f"--correction-rank {settings.correction_rank} is more than layers have: "
            + one_paragraph(problems, "Choose a lower one, or a share such as 10%.")
        )
    return Correction(served_in(config), ranks)


def _online_hadamard(
    config: PreTrainedConfig, family: Family, settings: QuantizeSettings, modules: Sequence[str]
) -> OnlineHadamard | None:
    """Raises SettingsError for a model that cannot be rotated."""
    if not settings.rotates:
        return None
    inner = rotation_of(config, family, settings.seed, settings.hadamard_block).inner
    rotated = tuple(name for name in modules if name.endswith(tuple(f".{layer}" for layer in family.reads_mlp)))
    return OnlineHadamard(rotated, inner.block, inner.order)
