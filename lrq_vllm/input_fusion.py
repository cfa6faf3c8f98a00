"""Which layers' inputs are quantized by the compiled graph, where torch.compile fuses it with what makes the input.

With one calibrated step for all tokens, an input is quantized point by point. A norm reads whole rows, and finds the sums of
the integers on the way; an activation function works point by point over the whole GPU, also for one token, and a sum of the
row would leave it to one block of threads. Attention is a kernel of its own, and so is a rotation: nothing fuses with them.

Steps of each token's own are left to our kernels: with what torch.compile made of a range per row, a step of w4a8 took the GPU
as long or longer (docs/kernels.md).
"""

from enum import Enum

from lrq_vllm.kernels.reference import InputKind

__all__ = ["Fusion", "fusion_of"]

_AFTER_ATTENTION, _AFTER_ACTIVATION = "o_proj", "down_proj"


class Fusion(Enum):
    """What of a layer's input the compiled graph computes."""

    NOTHING = "nothing"
    INTEGERS = "integers"
    INTEGERS_AND_TOTALS = "integers and the sum of each row of them"


def fusion_of(module: str, kind: InputKind, *, rotated: bool) -> Fusion:
    """module: the first one that is fused into the layer, by its name in the families that the project quantizes. A layer of
    another name is taken for one behind a norm, which costs time at most: every way computes the same.
    """
    name = module.rpartition(".")[2]
    if kind is not InputKind.STATIC or rotated or name == _AFTER_ATTENTION:
        return Fusion.NOTHING
    return Fusion.INTEGERS if name == _AFTER_ACTIVATION else Fusion.INTEGERS_AND_TOTALS
