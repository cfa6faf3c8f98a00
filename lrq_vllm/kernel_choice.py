"""Which kernel a layer runs on: the first that can, or the one that the environment variable LRQ_KERNEL names."""

import os
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from lrq_vllm.errors import SettingsError

__all__ = ["HOPPER", "REFERENCE", "TRITON", "VARIABLE", "Named", "first_that_can", "kernels_by_layer", "why_not_reference"]

HOPPER, TRITON, REFERENCE = "hopper", "triton", "reference"
VARIABLE = "LRQ_KERNEL"


class Named(Protocol):
    """A candidate; its name is what LRQ_KERNEL takes and what a layer shows as ``lrq_kernel``."""

    name: str


Candidate = TypeVar("Candidate", bound=Named)


def first_that_can(candidates: Sequence[tuple[Candidate, str | None]], device: torch.device) -> Candidate:
    """The first candidate whose reason not to run is None.

    Raises SettingsError with every reason if there is none, and if LRQ_KERNEL asks for one that cannot run.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted not in [candidate.name for candidate, _ in candidates]:
        names = ", ".join(candidate.name for candidate, _ in candidates)
        raise SettingsError(f"LRQ_KERNEL is {wanted!r}, but these layers run on one of {names}. Name one of them or unset it.")
    considered = [pair for pair in candidates if not wanted or pair[0].name == wanted]
    for candidate, reason in considered:
        if reason is None:
            return candidate
    reasons = "; ".join(f"{candidate.name}: {reason}" for candidate, reason in considered)
    if wanted:
        raise SettingsError(f"LRQ_KERNEL asks for a kernel that cannot run on {device} ({reasons}). Unset it.")
    raise SettingsError(
        f"No kernel runs these layers on {device} ({reasons}). Serve on an NVIDIA GPU of the Ampere generation or later, or on "
        "an x86 CPU with vLLM's CPU build."
    )


def why_not_reference() -> str | None:
    """The reason not to compute as the reference does, unless it was asked for: it is far too slow to serve with."""
    return None if os.environ.get(VARIABLE) == REFERENCE else f"is slow, and runs where {VARIABLE} names it"


def kernels_by_layer(model: torch.nn.Module) -> dict[str, str]:
    """Name of each quantized layer of one rank's model, as vLLM fuses them, and the kernel that it runs on."""
    return {name: str(module.lrq_kernel) for name, module in model.named_modules() if hasattr(module, "lrq_kernel")}
