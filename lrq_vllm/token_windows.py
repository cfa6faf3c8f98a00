"""Which stretches of a text are learned from or measured on: the offline and the served evaluation take the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrq_vllm.errors import CalibrationDataError

__all__ = ["spread_windows"]


def spread_windows(ids: Sequence[int], windows: int | None, seq_len: int) -> Tensor:
    """Token ids int64 [windows, seq_len]: spread evenly over the ids, the first at their beginning, the last at their end.

    windows None takes as many as fit side by side. Raises CalibrationDataError if there are too few ids for that many.
    """
    available = len(ids) // seq_len
    wanted = max(available, 1) if windows is None else windows
    if available < wanted:
        raise CalibrationDataError(
            f"The text has {len(ids)} tokens, which makes {available} windows of {seq_len}; {wanted} are needed. "
            "Give a longer text, fewer windows (--samples or --windows), or shorter ones (--seq-len)."
        )
    last = len(ids) - seq_len
    starts = torch.linspace(0, last, wanted).long().clamp(max=last)  # of very long texts float32 knows no odd ones
    starts[1:][-1:] = last
    return torch.stack([torch.tensor(ids[start : start + seq_len]) for start in starts.tolist()])
