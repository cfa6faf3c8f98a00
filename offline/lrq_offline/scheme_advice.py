"""What measurements say against a scheme, before the work starts."""

from dataclasses import dataclass

from lrq_offline.config import QuantizeSettings
from lrq_vllm.kernels.arranged_weight import group_unit

__all__ = ["W4A4_MEASURED", "MeasuredScheme", "scheme_warnings"]


@dataclass(frozen=True)
class MeasuredScheme:
    """kl: to the float model, nats per token. linear_bytes: of the quantized layers. gate_up_us: microseconds of one layer."""

    kl: float
    linear_bytes: int
    gate_up_us: float


# KL and bytes: bench/results/correction-small.json, method gptq, text "docs" (a Llama of 32M parameters). Times:
# bench/results/correction-speed-h200.json, Llama 3 8B's gate_up for 256 tokens on an H200.
W4A4_MEASURED = {
    "w4a4": MeasuredScheme(0.1871, 11_991_264, 51.24),
    "w4a4 10%": MeasuredScheme(0.1091, 19_001_568, 68.0),
    "w4a8": MeasuredScheme(0.0654, 11_991_040, 51.4),
}


def scheme_warnings(settings: QuantizeSettings) -> list[str]:
    """A sentence where another scheme is better, as small and as fast, and one where only a slow kernel serves the scheme."""
    return [sentence for sentence in (_better_scheme(settings), _slow_kernel(settings)) if sentence is not None]


def _better_scheme(settings: QuantizeSettings) -> str | None:
    if settings.scheme != "w4a4":
        return None
    plain, corrected, other = W4A4_MEASURED["w4a4"], W4A4_MEASURED["w4a4 10%"], W4A4_MEASURED["w4a8"]
    return (
        f"On Hopper GPUs w4a8 without a correction is better than w4a4 and as fast: where it was measured it leaves a KL "
        f"divergence of {other.kl:.3f} to the float model, w4a4 {plain.kl:.3f} in as many bytes, and with a correction of 10% "
        f"{corrected.kl:.3f} in {corrected.linear_bytes / other.linear_bytes:.2f} times as many; a layer takes "
        f"{other.gate_up_us:.0f}, {plain.gate_up_us:.0f} and {corrected.gate_up_us:.0f} microseconds for 256 tokens on an H200."
    )


def _slow_kernel(settings: QuantizeSettings) -> str | None:
    """What the kernels for Hopper GPUs do not take (lrq_vllm/kernels/arranged_linear.py)."""
    slow = "which saves memory and may take longer than 16-bit weights"
    if settings.bits.weight_bits == 2:
        return f"On GPUs {settings.scheme} is multiplied by a simple Triton kernel, {slow}: on Hopper w3a16 has a fast one."
    size, unit = settings.group_size, group_unit(integer=settings.bits.activation is not None)
    if size is None or size % unit == 0:
        return None
    return (
        f"In groups of {size} inputs {settings.scheme} is multiplied by a simple Triton kernel on GPUs, {slow}: on Hopper "
        f"groups of a multiple of {unit} have a fast one."
    )
