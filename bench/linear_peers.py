"""The linear layers that bench/linear.py compares: ours, and those of vLLM 0.25 and the libraries it brings.

Each takes a float weight [N, K] on the GPU, quantizes it itself (round to nearest, per channel or in groups of GROUP inputs)
and returns what computes y [M, N] = x [M, K] W^T in bfloat16, with all that a served layer does: quantizing x is part of it.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]
GROUP = 128


class Candidate(NamedTuple):
    """``make``: from a weight and a number of copies, as many layers that share no weight memory."""

    name: str
    scheme: str  # what it computes; "bf16" is the baseline
    make: Callable[[Tensor, int], list[Layer]]


def all_candidates() -> list[Candidate]:
    """The baseline, ours, and everyone else's."""
    return [
        Candidate("cuBLAS", "bf16", _bf16),
        *(
            Candidate("lrq", scheme, _lrq(bits, integer=integer, static=static, group=group))
            for scheme, bits, integer, static, group in (
                ("w8a8", 8, True, True, None),
                ("w4a8", 4, True, False, None),
                ("w4a16", 4, False, False, None),
                ("w3a16", 3, False, False, None),
                ("w4a16-g128", 4, False, False, GROUP),
                ("w4a8-g128", 4, True, False, GROUP),
            )
        ),
        Candidate("CUTLASS int8", "w8a8", _cutlass),
        Candidate("Humming", "w8a8", _humming("int8", "int8")),
        Candidate("Marlin", "w4a8", _marlin(int8=True)),
        Candidate("Humming", "w4a8", _humming("uint4", "int8")),
        Candidate("Marlin", "w4a16", _marlin(int8=False)),
        Candidate("Machete", "w4a16", _machete(None)),
        Candidate("Humming", "w4a16", _humming("uint4", None)),
        Candidate("Marlin", "w4a16-g128", _marlin(int8=False, group=GROUP)),
        Candidate("Machete", "w4a16-g128", _machete(GROUP)),
        Candidate("Humming", "w4a16-g128", _humming("uint4", None, group=GROUP)),
        Candidate("Marlin", "w4a8-g128", _marlin(int8=True, group=GROUP)),
        Candidate("Humming", "w4a8-g128", _humming("uint4", "int8", group=GROUP)),
        Candidate("Humming", "w3a16", _humming("uint3", None)),
    ]


def _bf16(weight: Tensor, copies: int) -> list[Layer]:
    return _each(torch.nn.functional.linear, weight.bfloat16(), copies)


def _each(layer: Callable[[Tensor, Tensor], Tensor], weight: Tensor, copies: int) -> list[Layer]:
    """``layer(x, weight)`` with a copy of the weight for each; a copy has the strides of the original."""
    clones = [
        torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device) for _ in range(copies)
    ]
    return [lambda x, w=clone.copy_(weight): layer(x, w) for clone in clones]  # noqa: B008


def _symmetric(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """q int32 [N, K] in -2^(b-1) .. 2^(b-1) - 1 and steps [N, 1], or a step for each group."""
    grouped = weight.unflatten(1, (-1, group or weight.shape[1]))
    step = grouped.abs().amax(dim=2, keepdim=True) / (2 ** (bits - 1) - 0.5)
    q = (grouped / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.int().flatten(1), step.squeeze(2)


def _cutlass(weight: Tensor, copies: int) -> list[Layer]:
    from vllm import _custom_ops as ops

    q, step = _symmetric(weight, 8)
    q = q.to(torch.int8)

    def layer(x: Tensor, w: Tensor) -> Tensor:
        x_q, x_step, _ = ops.scaled_int8_quant(x)
        return ops.cutlass_scaled_mm(x_q, w.t(), x_step, step, torch.bfloat16)

    return _each(layer, q, copies)


def _words(weight: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """GPTQ's layout of 4-bit weights with an offset of 8: int32 [K / 8, N]; steps [groups, N] bfloat16."""
    q, step = _symmetric(weight, 4, group)
    shifts = 4 * torch.arange(8, device=weight.device)
    words = ((q + 8).long().unflatten(1, (-1, 8)) << shifts).sum(dim=2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.t().contiguous(), step.t().contiguous().bfloat16()


def _marlin(*, int8: bool, group: int | None = None) -> Callable[[Tensor, int], list[Layer]]:
    def make(weight: Tensor, copies: int) -> list[Layer]:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types

        outputs, inputs = weight.shape
        words, step = _words(weight, group)
        none = torch.empty(0, dtype=torch.int, device=weight.device)
        packed = ops.gptq_marlin_repack(words, perm=none, size_k=inputs, size_n=outputs, num_bits=4, is_a_8bit=int8)
        steps = marlin_utils.marlin_permute_scales(step, inputs, outputs, group or -1, is_a_8bit=int8)
        unit = torch.ones(1, device=weight.device)
        if int8 and group:  # steps of groups are rounded to whole numbers of a unit
            steps, unit = marlin_utils.marlin_act_int8_process_scales(steps)
        workspace = marlin_utils.marlin_make_workspace_new(weight.device)

        def layer(x: Tensor, w: Tensor) -> Tensor:
            return marlin_utils.apply_gptq_marlin_linear(
                x, w, steps, none, none, none, workspace, scalar_types.uint4b8, outputs, inputs, True,
                input_global_scale=unit if int8 else None, input_dtype=torch.int8 if int8 else None,
            )  # fmt: skip

        return _each(layer, packed, copies)

    return make


def _machete(group: int | None) -> Callable[[Tensor, int], list[Layer]]:
    def make(weight: Tensor, copies: int) -> list[Layer]:
        from vllm import _custom_ops as ops
        from vllm.scalar_type import scalar_types

        words, step = _words(weight, group)
        kind = scalar_types.uint4b8
        packed = ops.machete_prepack_B(words.t().contiguous().t(), torch.bfloat16, kind, torch.bfloat16)

        def layer(x: Tensor, w: Tensor) -> Tensor:
            return ops.machete_mm(a=x, b_q=w, b_type=kind, b_group_scales=step, b_group_size=group or -1)

        return _each(layer, packed, copies)

    return make


def _humming(weight_dtype: str, input_dtype: str | None, group: int = 0) -> Callable[[Tensor, int], list[Layer]]:
    def make(weight: Tensor, copies: int) -> list[Layer]:
        from humming.layer import HummingLayer

        layer = HummingLayer(
            shape_n=weight.shape[0], shape_k=weight.shape[1],
            weight_config={"quant_method": "humming", "dtype": weight_dtype, "group_size": group},
            input_config={"quant_method": "humming", "dtype": input_dtype or "bfloat16"},
            pad_n_to_multiple=256, pad_k_to_multiple=128, torch_dtype=torch.bfloat16,
        ).to(weight.device)  # fmt: skip
        layer.load_from_unquantized(weight.bfloat16())
        layer.transform()
        layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        return [lambda x, one=one: one(x, compute_config={"gemm_type": "dense"}) for one in layers]

    return make


def _lrq(bits: int, *, integer: bool, static: bool, group: int | None) -> Callable[[Tensor, int], list[Layer]]:
    def make(weight: Tensor, copies: int) -> list[Layer]:
        from lrq_vllm.kernels.arranged_linear import arranged_linear
        from lrq_vllm.kernels.arranged_weight import arrange
        from lrq_vllm.kernels.reference import PER_TOKEN, static_grid

        grouped = weight.unflatten(1, (-1, group or weight.shape[1]))
        low, high = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
        step = (high - low) / (2**bits - 1)
        zero = (-low / step).round()
        shift = 128 if bits == 8 else 0
        q = ((grouped / step).round() + zero).clamp(0, 2**bits - 1).int().flatten(1) - shift
        zeros = zero.squeeze(2).int() - shift
        size = grouped.shape[2]
        total = q.unflatten(1, (-1, size)).sum(dim=2, dtype=torch.int32) - size * zeros if integer else None
        ready = arrange(q, step.squeeze(2), zeros, total, bits, integer=integer)
        calibrated = torch.tensor([8 / 255], device=weight.device), torch.tensor([127], dtype=torch.uint8, device=weight.device)
        grid = static_grid(*calibrated) if static else PER_TOKEN
        weights = [ready.copy() for _ in range(copies)]
        return [lambda x, w=w: arranged_linear(x, w, None, grid) for w in weights]

    return make
