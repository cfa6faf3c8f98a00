"""The factors of a low-rank correction on a vLLM layer, laid out for a GPU."""

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lrq_vllm.kernels.low_rank import Factors

__all__ = ["factors_of", "put_factors"]


def put_factors(layer: Any, factors: Factors) -> None:
    """As parameters of the layer."""
    layer.lrq_low_rank_v = Parameter(factors.v, requires_grad=False)
    layer.lrq_low_rank_u = Parameter(factors.u, requires_grad=False)
    layer.lrq_low_rank_sizes = list(factors.widths), list(factors.ranks)


def factors_of(layer: Any) -> tuple[list[Tensor], list[int], list[int]]:
    """As torch's ops take them: V and U, and the widths and ranks of their parts. Nothing of a layer without a correction."""
    if not hasattr(layer, "lrq_low_rank_sizes"):
        return [], [], []
    return [layer.lrq_low_rank_v, layer.lrq_low_rank_u], *layer.lrq_low_rank_sizes
