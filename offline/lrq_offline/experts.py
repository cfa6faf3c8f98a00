"""Mixtures of experts as modules: each expert with linear layers of its own, named as in the checkpoints of the family.

transformers keeps the weights of all experts of a block in two tensors, in which no layer can be replaced.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrq_offline.ranks import ONE_RANK, Ranks

__all__ = ["DenseBlocks", "ExpertNames", "Experts", "experts_of"]


@dataclass(frozen=True)
class DenseBlocks:
    """Where config.json says which blocks have one MLP instead of experts: those listed, by their places from 0, and of all
    others those that are not every ``step``-th.
    """

    listed: str
    step: str

    def among(self, config: PreTrainedConfig, index: int) -> bool:
        """Whether block ``index``, from 0, of a model is one of them."""
        step = int(getattr(config, self.step))
        return index in getattr(config, self.listed) or step < 1 or (index + 1) % step != 0

    def settings(self, blocks: list[int]) -> dict[str, Any]:
        """What config.json holds if these are the blocks."""
        return {self.listed: blocks, self.step: 1}


@dataclass(frozen=True)
class ExpertNames:
    """Names within a block, as in checkpoint files. In config.json: count and width, of the experts and of their inside, and
    choices, how many of them a token meets.

    router: what chooses the experts of a token; it reads what they read, and stays in 16 bits.
    dense: None for a family whose blocks all have experts.
    """

    module: str
    router: str
    gate: str
    up: str
    down: str
    count: str
    width: str
    choices: str = "num_experts_per_tok"
    dense: DenseBlocks | None = None

    def in_block(self, config: PreTrainedConfig, index: int) -> bool:
        """Whether block ``index``, from 0, of a model has experts."""
        return getattr(config, self.count) > 0 and (self.dense is None or not self.dense.among(config, index))

    def inputs_of(self, expert: int) -> tuple[str, str]:
        """The two layers of an expert that read the block's normalized tokens."""
        return f"{self.module}.{expert}.{self.gate}", f"{self.module}.{expert}.{self.up}"

    def output_of(self, expert: int) -> str:
        """The layer that reads what these two make."""
        return f"{self.module}.{expert}.{self.down}"


class Experts(nn.ModuleList):
    """In place of transformers' fused experts, with weights yet to be filled.

    ranks: the processes that look at what these experts receive. With several, an expert that no token of this one has chosen
    computes as well, with none: whoever watches its layers is called in all processes.
    """

    ranks: Ranks = ONE_RANK

    def __init__(self, fused: Any, names: ExpertNames) -> None:
        weight = fused.down_proj
        with torch.device(weight.device):
            experts = [_Expert(fused.hidden_dim, fused.intermediate_dim, fused.act_fn, names) for _ in range(fused.num_experts)]
        super().__init__(expert.to(weight.dtype) for expert in experts)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The sum [tokens, width] of what the chosen experts make of x [tokens, width], in float32 until it is whole.

        chosen: int64 [tokens, choices]. shares: by which factor each choice counts, [tokens, choices].
        """
        met = chosen.flatten().bincount(minlength=len(self))
        by_expert = chosen.flatten().argsort(stable=True)
        token = by_expert // chosen.shape[1]
        # How many tokens each expert has is the one thing that the host has to know.
        parts = zip(self, x[token].split(met.tolist()), strict=True)
        made = [expert(tokens).float() for expert, tokens in parts if len(tokens) or self.ranks.size > 1]
        counted = torch.cat(made) * shares.flatten()[by_expert].float().unsqueeze(1)
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, token, counted).to(x.dtype)


def experts_of(block: nn.Module) -> list[Experts]:
    """The mixtures of experts in ``block``."""
    return [module for module in block.modules() if isinstance(module, Experts)]


class _Expert(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, act_fn: nn.Module, names: ExpertNames) -> None:
        super().__init__()
        self._names = (names.gate, names.up, names.down)
        for name, shape in zip(self._names, ((width, inner), (width, inner), (inner, width)), strict=True):
            self.add_module(name, nn.Linear(*shape, bias=False))
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        out: Tensor = down(self.act_fn(gate(x)) * up(x))
        return out
