"""SmoothQuant (arXiv 2211.10438): move outliers from activations into the weights that read them; the float model stays.

    s_j = max|X_j|^alpha / max_i |W_ij|^(1 - alpha),   X / s,   W * s

The division is done by whatever produces X: the gain of a norm, or the rows of a linear layer before it.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from lrq_offline.activation_ranges import OutputError, least
from lrq_offline.layer_inputs import InputSample
from lrq_vllm.checkpoint.affine import dequantize, quantize, step_and_zero_point

__all__ = ["SharedHeads", "divide_output", "multiply_input", "smoothing_scale"]

_COARSE = [0.2 * i for i in range(6)]
_FINE = [0.05 * i for i in (0, -1, 1, -2, 2)]
_CLIPPING = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.09)
_LEAST = 1e-5


@dataclass(frozen=True)
class SharedHeads:
    """How a producer's outputs recur among the inputs: every ``size`` of them ``repeats`` times in a row.

    Grouped-query attention hands each value head to several query heads; elsewhere repeats is 1.
    """

    repeats: int = 1
    size: int = 1

    def largest(self, values: Tensor) -> Tensor:
        """values [in], each replaced by the largest of those that are copies of the same output."""
        parts = values.view(-1, self.repeats, self.size)
        return parts.amax(dim=1, keepdim=True).expand_as(parts).reshape(-1)

    def once(self, values: Tensor) -> Tensor:
        """values [in] that are equal among copies, each once: [in / repeats], in the producer's order."""
        return values.view(-1, self.repeats, self.size)[:, 0].reshape(-1)

    def repeated(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`once`."""
        return values.view(-1, 1, self.size).expand(-1, self.repeats, -1).reshape(-1)


def smoothing_scale(sample: InputSample, weight: Tensor, heads: SharedHeads, weight_bits: int, activation_bits: int) -> Tensor:
    """The scale s [in] whose alpha (0, 0.05 .. 1, or no smoothing at all) gives the least error of the product.

    weight: the W of all layers that read the input, one above the other, [out, in]. Inputs that are copies of one output of
    the producer (``heads``) share their scale. Alpha is searched coarse to fine, with both sides rounded to nearest,
    activations by one static range.
    """
    largest_input = heads.largest(torch.maximum(-sample.low, sample.high))
    largest_weight = heads.largest(weight.abs().amax(dim=0))
    cost = OutputError(sample.tokens, weight)

    def error(scale: Tensor) -> Tensor:
        smoothed, scaled = sample.tokens / scale, weight * scale
        steps = step_and_zero_point(*scaled.aminmax(dim=1, keepdim=True), weight_bits)
        rounded = dequantize(quantize(scaled, *steps, weight_bits), *steps)
        low, high = (sample.low / scale).min(), (sample.high / scale).max()

        def clipped(share: float) -> Tensor:
            step, zero_point = step_and_zero_point(low * share, high * share, activation_bits)
            x = dequantize(quantize(smoothed, step, zero_point, activation_bits), step, zero_point)
            return cost.of(x, rounded)

        return torch.stack([clipped(share) for share in _CLIPPING]).min()

    def scale_at(alpha: float) -> Tensor:
        return _scale(largest_input, largest_weight, alpha)

    @cache
    def error_at(alpha: float) -> Tensor:
        return error(scale_at(alpha))

    coarse = least(_COARSE, error_at)
    fine = least([coarse + offset for offset in _FINE if 0 <= coarse + offset <= 1], error_at)
    unsmoothed = torch.ones_like(largest_input)
    return scale_at(fine) if error_at(fine) < error(unsmoothed) else unsmoothed


def _scale(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    scale = largest_input.clamp(min=_LEAST) ** alpha / largest_weight.clamp(min=_LEAST) ** (1 - alpha)
    # A channel that is always zero, or that nobody reads, needs no scale.
    return torch.where((largest_input > 0) & (largest_weight > 0), scale, torch.ones_like(scale)).clamp(min=_LEAST)


def divide_output(producer: nn.Module, scale: Tensor, stored_dtype: torch.dtype, gain_offset: float = 0.0) -> Tensor:
    """Divide what ``producer`` (a norm, or a linear layer) puts out last by s [n], in place; return the s really used.

    A norm's gain, less ``gain_offset``, is stored in ``stored_dtype``: it is rounded, and s is what that leaves, so that the
    product stays exact.
    """
    weight = producer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        if weight.dim() == 1:
            largest = torch.finfo(stored_dtype).max
            before = weight + gain_offset
            stored = (before / scale - gain_offset).clamp(-largest, largest).to(stored_dtype).float()
            gain = stored + gain_offset
            used = torch.where(gain != 0, before / gain, torch.ones_like(gain))
            weight.copy_(torch.where(gain != 0, stored, weight))
            return used
        weight[-len(scale) :].div_(scale.unsqueeze(1))
        if isinstance(producer, nn.Linear) and producer.bias is not None:
            bias = producer.bias[-len(scale) :]
            bias.copy_((bias / scale).to(stored_dtype))
        return scale


def multiply_input(reader: nn.Module, scale: Tensor, stored_dtype: torch.dtype | None = None) -> None:
    """Multiply the columns of a module's W [out, in] by s [in], in place; rounded to ``stored_dtype`` if nothing else will."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(scale)
        if stored_dtype is not None:
            weight.copy_(weight.to(stored_dtype))
