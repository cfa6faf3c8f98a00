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


def fusion_of(module: str, kind: InputKind, *, rotated: bool, exchanged: bool) -> Fusion:
    """module: the first one that is fused into the layer, by its name in the families that the project quantizes. A layer of
    another name is taken for one behind a norm, which costs time at most. exchanged: whether several ranks would exchange what
    attention and the activation function put out (tp_invariance.py). What is fused is not rounded to 16 bits before it is
    quantized, so then one rank may not fuse it either.
    """
    name = module.rpartition(".")[2]
    if kind is not InputKind.STATIC or rotated or name == _AFTER_ATTENTION:
        return Fusion.NOTHING
    if name == _AFTER_ACTIVATION:
        return Fusion.NOTHING if exchanged else Fusion.INTEGERS
    return Fusion.INTEGERS_AND_TOTALS
