"""How far a mean over windows of text may be from the mean over all such text."""

import torch
from torch import Tensor

__all__ = ["mean_interval"]

_RESAMPLES = 1000


def mean_interval(values: Tensor) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of ``values`` [windows].

    Values are drawn with the same seed every time: intervals are reproducible, and those of equally many values are of the
    same draws.
    """
    chosen = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[chosen].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
