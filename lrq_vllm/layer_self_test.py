"""With LRQ_SELFTEST=1, each layer is compared with the reference as soon as it is loaded, on the kernel that will serve it.

It finds a kernel that computes something else than the stored integers mean, and names the first such layer. What it takes is
this rank's share of the weight, so it cannot find that vLLM gave the rank a wrong one: golden_replay.py does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrq_vllm.errors import CheckpointError
from lrq_vllm.switches import is_on

__all__ = ["VARIABLE", "check_layer", "wanted"]

VARIABLE = "LRQ_SELFTEST"
_TOKENS = (1, 6, 40)  # kernels differ by how many there are
_TOLERANCE = 1e-2  # of the output's norm; rounding to 16 bits makes a third of it


def wanted() -> bool:
    """Whether it is asked for. Raises SettingsError for a value of the variable that is neither 0 nor 1."""
    return is_on(VARIABLE, "to test layers while they load")


def check_layer(
    name: str, served: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], weight: Tensor, inputs: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Compare both for x [tokens, inputs] in ``dtype`` on ``weight``'s device; does nothing unless the variable is 1.

    Raises CheckpointError naming the layer if they differ by more than rounding.
    """
    if not wanted():
        return
    generator = torch.Generator().manual_seed(0)
    for tokens in _TOKENS:
        x = torch.randn(tokens, inputs, generator=generator)
        x[:, ::97] *= 20  # outliers, as activations have them
        x = x.to(weight.device, dtype)
        found, reference = served(x).float(), expected(x).float()
        difference = ((found - reference).norm() / reference.norm().clamp(min=1e-9)).item()
        if not difference <= _TOLERANCE:
            raise CheckpointError(
                f"Self-test ({VARIABLE}=1): {name} computes something else than the reference, for {tokens} tokens by "
                f"{difference:.1%} of the output. Do not serve this: try LRQ_KERNEL=triton on a GPU, or another version of "
                "vLLM, and report it."
            )
