"""Proof that vLLM's model of a checkpoint holds its tensors: each of them, once, with the same values. Needs vLLM.

vLLM ignores tensors that its model code does not ask for, and takes no notice of parameters that nothing fills. So the real
model is built in host memory, every parameter's loader is watched, and what has arrived is compared with the files.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_vllm.checkpoint.store import COMPUTED_ANYWAY, TensorFolder
from lrq_vllm.errors import CheckpointError, one_paragraph
from lrq_vllm.fused_parts import part_of
from lrq_vllm.vllm_world import vllm_world

__all__ = ["Loaded", "prove_loading"]


@dataclass(frozen=True)
class Loaded:
    """How many tensors went into how many parameters, and the name of the model's class in vLLM."""

    tensors: int
    parameters: int
    model: str


def prove_loading(folder: Path) -> Loaded:
    """Build vLLM's model and load it, without running it; once in a process.

    Raises CheckpointError naming each tensor that vLLM ignored, took twice or changed, and each parameter that stayed empty;
    and whatever vLLM itself says of a checkpoint that it does not load.
    """
    tensors = TensorFolder(folder)
    with _model_of(folder) as model:
        arrivals = _loaded(model, tensors)
        parameters = dict(model.named_parameters())
        problems = [f"{name} of vLLM's model got no tensor" for name in parameters if not arrivals[name]]
        taken: dict[str, int] = defaultdict(int)
        for name, parts in arrivals.items():
            for tensor, _ in parts:
                taken[tensor] += 1
            if parts and not _equal(parameters[name].data, parts, tensors):
                problems.append(f"{name} of vLLM's model is not {', '.join(tensor for tensor, _ in parts)}")
        for tensor in sorted(tensors):
            if taken[tensor] == 0 and not _may_be_ignored(tensor, model):
                problems.append(f"vLLM ignored tensor {tensor}")
            elif taken[tensor] > 1:
                problems.append(f"vLLM took tensor {tensor} {taken[tensor]} times")
        if problems:
            cure = "This vLLM's model code and the checkpoint do not fit each other: use a version of vLLM that lrq names."
            raise CheckpointError(f"{folder} is not what vLLM would serve: " + one_paragraph(problems, cure))
        return Loaded(sum(taken.values()), len(parameters), type(model).__name__)


Arrival = tuple[str, int]
"""A tensor's name in the checkpoint, and which part of a fused parameter it is."""


@contextmanager
def _model_of(folder: Path) -> Iterator[torch.nn.Module]:
    """vLLM's model for a checkpoint, empty, on the CPU, on one rank."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(model=str(folder), enforce_eager=True, max_model_len=64).create_engine_config()
    with torch.device("cpu"), vllm_world(config, config.model_config.dtype):
        yield initialize_model(config)


def _loaded(model: Any, tensors: TensorFolder) -> dict[str, list[Arrival]]:
    """Let ``model`` load; parameter name -> what arrived there."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    arrivals: dict[str, list[Arrival]] = defaultdict(list)
    owners: dict[int, str] = {}  # of memory, by where it begins

    def watched(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def watched_load(*given: Any, **keywords: Any) -> Any:
            loaded, shard = (given[1], given[2:]) if len(given) > 1 else (keywords["loaded_weight"], ())
            arrivals[name].append((owners[loaded.untyped_storage().data_ptr()], part_of(shard, keywords)))
            return load(*given, **keywords)

        return watched_load

    for name, parameter in model.named_parameters():
        parameter.weight_loader = watched(name, getattr(parameter, "weight_loader", default_weight_loader))

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(tensors):
            tensor = tensors.get(name)
            owners[tensor.untyped_storage().data_ptr()] = name
            yield name, tensor

    model.load_weights(weights())
    return arrivals


def _equal(parameter: Tensor, parts: list[Arrival], tensors: TensorFolder) -> bool:
    """Whether a parameter is its parts, one below the other; a vocabulary may be padded, one value fill several places, experts
    have a dimension of their own, and low-rank factors are as wide as the widest of them.
    """
    ordered = [tensors.get(name) for name, _ in sorted(parts, key=itemgetter(1))]
    ordered = [tensor if tensor.ndim else tensor[None] for tensor in ordered]
    width = max(tensor.shape[-1] for tensor in ordered)
    stored = torch.cat([pad(tensor, (0, width - tensor.shape[-1])) if tensor.ndim > 1 else tensor for tensor in ordered])
    stored = stored.to(parameter.dtype)
    if stored.numel() == 1:
        return bool((parameter == stored).all())
    return torch.equal(parameter.reshape(-1, *stored.shape[1:])[: len(stored)], stored)


def _may_be_ignored(tensor: str, model: Any) -> bool:
    tied = tensor == "lm_head.weight" and getattr(model.config, "tie_word_embeddings", False)
    return tied or tensor.endswith(COMPUTED_ANYWAY)
