"""What the tests of verification share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lrq_vllm.errors import LrqError

CPU_VLLM = pytest.mark.skipif(torch.cuda.is_available(), reason="builds vLLM's model on the CPU, which needs its CPU build")


def said_of(call: Callable[[Path], Any], folder: Path) -> str:
    """Why it is refused."""
    with pytest.raises(LrqError) as caught:
        call(folder)
    return str(caught.value)
