"""QuaRot's rotations (arXiv 2404.00456): spread outliers over all channels before quantizing; the float model stays what it is.

The residual stream h becomes R h with R = H diag(s): H a Hadamard matrix over sqrt(width), s random signs. An RMSNorm without
gains commutes with R, so each norm's gains g move into the layers that read it:

    reads the stream through a norm (q, k, v, gate, up, the output head):   W diag(g) R^T
    writes to the stream (the embedding's rows, o_proj, down_proj):         R W, and R b for a bias
    values, head by head:                  H_h v, undone by o_proj's        W H_h^T    (nothing is left to do while serving)
    the input of down_proj:                H_B x while serving, undone by   W H_B^T

lrq_vllm/checkpoint/hadamard.py defines the matrices. All arithmetic is float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lrq_offline.decoder_blocks import Family
from lrq_vllm.checkpoint.hadamard import paley_order, rotate
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["BlockRotation", "Rotation", "rotation_of"]

# Rows of a weight that are rotated at once: a vocabulary has many.
_ROWS_AT_ONCE = 8192
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BlockRotation:
    """H_B for every ``block`` of neighbouring channels, with a Paley matrix of ``order`` in it; computed on ``device``."""

    block: int
    order: int
    device: torch.device

    def rows(self, weight: Tensor) -> Tensor:
        """Each row w of a weight [..., in] as H w, float32."""
        parts = (rows.to(self.device) for rows in weight.split(_ROWS_AT_ONCE))
        return torch.cat([rotate(rows, self.block, self.order).to(weight.device) for rows in parts])

    def columns(self, weight: Tensor) -> Tensor:
        """H W for W [out, in], or H b for a bias [out]; float32."""
        return self.rows(weight.unsqueeze(0))[0] if weight.dim() == 1 else self.rows(weight.T).T.contiguous()


@dataclass(frozen=True)
class Rotation:
    """What is done to a model. signs: s [width], float32. head, inner: of values, and of down_proj's input."""

    signs: Tensor
    stream: BlockRotation
    head: BlockRotation
    inner: BlockRotation

    def reads_stream(self, weight: Tensor, gain: Tensor | None = None) -> Tensor:
        """W diag(g) R^T for W [out, width] and g [width]; without gains also R e for each row e of an embedding."""
        scale = self.signs if gain is None else self.signs * gain.float()
        return self.stream.rows(weight.float() * scale)

    def writes_stream(self, weight: Tensor) -> Tensor:
        """R W for W [width, in], R b for b [width]."""
        signs = self.signs if weight.dim() == 1 else self.signs.unsqueeze(1)
        return self.stream.columns(weight.float() * signs)


def rotation_of(
    config: PreTrainedConfig, family: Family, seed: int, inner_block: int | None = None, device: torch.device = _CPU
) -> Rotation:
    """The rotation of a model. inner_block: H_B's size before down_proj; None takes its whole input. device: where it is
    computed, a part of a weight at a time; weights come from the CPU, and go back to it.

    Raises SettingsError naming everything that stands in the way.
    """
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"hidden_size": config.hidden_size, "the size of a head": head_size}
    sizes["the block before down_proj" if inner_block else "intermediate_size"] = inner_block or config.intermediate_size
    orders = {name: paley_order(size) for name, size in sizes.items()}
    problems = []
    if family.experts is not None:
        problems.append("it has experts")
    if any(joiner in family.norms for _, joiner in family.residual):
        problems.append("norms stand between its layers and the residual stream, where a rotation does not pass")
    problems += [
        f"no Hadamard matrix is known for {name} {sizes[name]} (powers of two times an order of Paley's up to 1024 are)"
        for name, order in orders.items()
        if order is None
    ]
    if inner_block and config.intermediate_size % inner_block:
        problems.append(
            f"the block before down_proj, {inner_block}, does not divide intermediate_size {config.intermediate_size}"
        )
    if problems:
        cure = (
            "Pass --no-rotate"
            + ("" if family.experts else ", or --hadamard-block if only down_proj's input is the obstacle")
            + "."
        )
        raise SettingsError(f"This {config.model_type} model cannot be rotated: {one_paragraph(problems, cure)}")
    stream, head, inner = (BlockRotation(sizes[name], order, device) for name, order in orders.items() if order is not None)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (config.hidden_size,), generator=generator).float() * 2 - 1
    return Rotation(signs, stream, head, inner)
