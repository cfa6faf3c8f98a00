"""Which stretches of a text are taken."""

import pytest
import torch

from lrq_vllm.token_windows import spread_windows


@pytest.mark.parametrize("tokens", [512, 2048, 5000, 2**24 + 515, 2**25 + 3])
def test_windows_are_whole_and_reach_from_the_beginning_to_the_end(tokens: int) -> None:
    windows = spread_windows(range(tokens), 4 if tokens >= 2048 else 1, 512)
    assert torch.equal(windows - windows[:, :1], torch.arange(512).expand(len(windows), -1))
    assert windows[0, 0] == 0 and windows[-1, -1] == tokens - 1
    assert torch.equal(windows[:, 0].sort().values, windows[:, 0])
