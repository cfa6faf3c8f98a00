"""With LRQ_TP_INVARIANT=1, what a model puts out does not depend on how many tensor-parallel ranks share it.

vLLM cuts o_proj and down_proj along their inputs. Each rank then quantizes a token by what it sees of it, and rounds its part
of every sum to 16 bits before the parts are added: another number of ranks gives other numbers. Here the ranks have some of
such a layer's outputs each, and all its inputs, which they gather first; then they gather the outputs. Every output is one sum
in one rank, by the kernel that would take it on one rank. The weight is divided as before, V of a low-rank correction is not,
and two exchanges take the place of one.
"""

from typing import Any

import torch
from torch import Tensor

from lrq_vllm.errors import SettingsError
from lrq_vllm.switches import is_on

__all__ = [
    "VARIABLE", "check_sum", "counted_once", "from_all_ranks", "invariant", "load_own_outputs", "own_outputs", "shares_inputs",
    "sum_of_all_ranks",
]  # fmt: skip

VARIABLE = "LRQ_TP_INVARIANT"


def invariant() -> bool:
    """Whether it is asked for. Raises SettingsError for a value of the variable that is neither 0 nor 1."""
    return is_on(VARIABLE, "for results that do not depend on the number of ranks")


def check_sum(layer: Any, name: str) -> None:
    """Raises SettingsError if ranks share the inputs of a linear layer that is vLLM's alone."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    if invariant() and isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
        raise SettingsError(
            f"{VARIABLE}=1, but {name} is not quantized: vLLM adds up what {layer.tp_size} ranks make of some inputs each. "
            "Quantize it too, or unset the variable."
        )


def shares_inputs(layer: Any) -> bool:
    """Whether ranks would share the inputs of a linear layer of vLLM, and it adds up what they make of them."""
    return layer.tp_size > 1 and getattr(layer, "reduce_results", False)


def own_outputs(outputs: int, ranks: int, name: str) -> int:
    """How many a rank has of a layer's. Raises SettingsError if they do not divide."""
    if outputs % ranks:
        raise SettingsError(f"{VARIABLE}=1: {name} has {outputs} outputs, which {ranks} ranks cannot share. Unset it.")
    return outputs // ranks


def load_own_outputs(parameter: Any, loaded: Tensor) -> None:
    """A weight loader: what this rank takes of a tensor if it has some of the outputs and all inputs."""
    parameter.load_column_parallel_weight(loaded_weight=loaded)


def from_all_ranks(own: Tensor) -> Tensor:
    """[..., ranks * own]: the last dimension of every rank's tensor, one rank's behind the other's."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(own.contiguous())


def sum_of_all_ranks(own: Tensor) -> Tensor:
    """Of tensors that are 0 in all ranks but one, element by element: nothing is rounded."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(own)


def counted_once(y: Tensor) -> Tensor:
    """y in one rank and 0 in the others, where vLLM is going to add up what all of them have as a whole."""
    from vllm.distributed import get_tp_group

    return y if get_tp_group().rank_in_group == 0 else torch.zeros_like(y)
