"""First step sizes and zero-points of a weight, before any learning: the best clipping of each channel's range."""

import torch
from torch import Tensor

from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize, step_and_zero_point

__all__ = ["search_steps"]

_COARSE = [1.0 - 0.05 * i for i in range(14)]  # 1.00 .. 0.35
_FINE = [0.01 * i for i in range(-4, 5)]
_ERROR_POWER = 2.4


def search_steps(weight: Tensor, bits: int, group_size: int | None = None, *, symmetric: bool = False) -> StepAndZeroPoint:
    """Steps and zero-points [out, groups] that minimise sum |W - W_hat|^2.4 per group, for W [out, in].

    The min-max range of each group is shrunk by a common ratio, searched coarse to fine (LRQ's authors search ratio and
    zero-point; the 1-D search comes within 1.3% of that error). group_size must divide in.
    """
    grouped = weight.float().unflatten(1, (-1, group_size or weight.shape[1]))
    low, high = torch.aminmax(grouped, dim=2)

    def error(ratio: Tensor) -> Tensor:
        step, zero_point = (t.unsqueeze(2) for t in step_and_zero_point(low * ratio, high * ratio, bits, symmetric=symmetric))
        difference = dequantize(quantize(grouped, step, zero_point, bits), step, zero_point) - grouped
        return difference.abs_().pow_(_ERROR_POWER).sum(dim=2)

    ratios = torch.tensor(_COARSE, device=low.device)
    best = ratios[torch.stack([error(torch.full_like(low, ratio)) for ratio in _COARSE]).argmin(dim=0)]
    candidates = torch.stack([(best + offset).clamp(max=1.0) for offset in _FINE])
    errors = torch.stack([error(candidate) for candidate in candidates])
    best = candidates.gather(0, errors.argmin(dim=0, keepdim=True)).squeeze(0)
    return step_and_zero_point(low * best, high * best, bits, symmetric=symmetric)
