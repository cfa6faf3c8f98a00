"""Who multiplies integers on which device. Each backend computes the scheme exactly, or says why it cannot run."""

import os
import platform
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm import exact_ops
from lrq_vllm.arranged_layer import arranged_linear, keep_arranged, quantized_in_graph
from lrq_vllm.checkpoint.packing import unpack
from lrq_vllm.input_fusion import Fusion
from lrq_vllm.kernel_choice import HOPPER, REFERENCE, TRITON, first_that_can, why_not_reference
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.arranged_linear import why_not
from lrq_vllm.kernels.arranged_weight import WeightShape, arrange
from lrq_vllm.kernels.reference import InputGrid, InputKind, IntegerWeight, QuantizedTokens

__all__ = [
    "CpuGroupsBackend", "HopperBackend", "IntegerBackend", "LayerInput", "OneDnnBackend", "ReferenceBackend", "TritonBackend",
    "choose_integer_backend", "integer_candidates",
]  # fmt: skip

_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
"""Limits of oneDNN's instructions, as ONEDNN_MAX_CPU_ISA has them, under which it adds up products of bytes in 16 bits."""


class LayerInput(NamedTuple):
    """What comes into a layer."""

    features: int
    dtype: torch.dtype
    kind: InputKind
    fusion: Fusion = Fusion.NOTHING


class IntegerBackend(Protocol):
    """Quantizes activations and multiplies them with a prepared weight; the arithmetic is that of kernels/reference.py."""

    name: str

    def why_not(self, weight: IntegerWeight, x: LayerInput) -> str | None:
        """The reason why this backend cannot run with this weight, on its device, or None if it can."""

    def prepare(self, layer: Any, weight: IntegerWeight, x: LayerInput) -> None:
        """Put the weight on the layer in this backend's layout, as parameters."""

    def linear(self, layer: Any, x: Tensor, grid: InputGrid, bias: Tensor | None) -> Tensor:
        """y [tokens, out] in x's dtype. grid: how x is quantized, of the prepared kind."""


def choose_integer_backend(weight: IntegerWeight, x: LayerInput) -> IntegerBackend:
    """The first backend that can run, or the one that LRQ_KERNEL names.

    Raises SettingsError with every backend's reason if none can.
    """
    return first_that_can(integer_candidates(weight, x), weight.step.device)


def integer_candidates(weight: IntegerWeight, x: LayerInput) -> list[tuple[IntegerBackend, str | None]]:
    """Every backend, the best first, and the reason why it cannot run with this weight, or None if it can."""
    backends: tuple[IntegerBackend, ...] = (
        HopperBackend(), TritonBackend(), OneDnnBackend(), CpuGroupsBackend(), ReferenceBackend()
    )  # fmt: skip
    return [(backend, backend.why_not(weight, x)) for backend in backends]


class HopperBackend:
    """Our kernels for Hopper GPUs, as one opaque op: the weight is laid out for them at load and kept in its bits."""

    name = HOPPER

    def why_not(self, weight: IntegerWeight, x: LayerInput) -> str | None:
        """Needs a Hopper GPU, and sizes that fit."""
        if x.dtype not in (torch.bfloat16, torch.float16):
            return f"takes 16-bit activations, not {x.dtype}"
        shape = WeightShape(weight.bits, True, len(weight.step), x.features, weight.groups > 1)
        return why_not(weight.step.device, shape, weight.groups)

    def prepare(self, layer: Any, weight: IntegerWeight, x: LayerInput) -> None:
        """Lay the weight out and compile what it may need."""
        q = weight.q if weight.bits == 8 else unpack(weight.q, weight.bits, x.features)
        arranged = arrange(q, weight.step, weight.zero_point, weight.total, weight.bits, integer=True)
        keep_arranged(layer, arranged, x.dtype, x.kind)
        layer.lrq_fusion = x.fusion

    def linear(self, layer: Any, x: Tensor, grid: InputGrid, bias: Tensor | None) -> Tensor:
        """Quantization, product and scaling in one kernel or few, chosen by the number of tokens; in a compiled graph the
        quantization is a part of what makes x, where that is faster.
        """
        if layer.lrq_fusion is not Fusion.NOTHING and torch.compiler.is_compiling():
            return quantized_in_graph(layer, x, bias, grid, layer.lrq_fusion)
        return arranged_linear(layer, x, bias, grid)


class TritonBackend:
    """Our Triton kernels, as opaque ops: they survive torch.compile and CUDA graphs. 4-bit weights stay packed."""

    name = TRITON

    def why_not(self, weight: IntegerWeight, x: LayerInput) -> str | None:
        """Needs CUDA."""
        return None if weight.step.is_cuda else "needs a CUDA device"

    def prepare(self, layer: Any, weight: IntegerWeight, x: LayerInput) -> None:
        """Keep the checkpoint's layout, and the column sums beside it."""
        _keep(layer, weight)

    def linear(self, layer: Any, x: Tensor, grid: InputGrid, bias: Tensor | None) -> Tensor:
        """int8 tensor cores; exact int32 sums."""
        from lrq_vllm.kernels import ops

        tokens = ops.quantize_input(x, grid.kind, list(grid.calibrated))
        *weight, bits = _kept(layer)
        return ops.integer_linear(*tokens, *weight, bias, bits, x.dtype)


class OneDnnBackend:
    """The CPU: integer sums from vLLM's oneDNN int8 product, the rest as the reference does it, in the same order.

    torch.compile fuses the quantization with what stands before the layer and the scaling with what follows; vLLM's own
    CPU quantizer rounds differently. 4-bit weights are unpacked to int8 at load, so they take 8 bits in memory.

    x86 CPUs without VNNI add products of bytes in pairs, in 16 bits that saturate: 255 * 127 * 2 does not fit. There an
    8-bit weight is multiplied as two halves of 7 bits, whose pairs do fit, and takes 16 bits in memory.
    """

    name = "onednn"

    def why_not(self, weight: IntegerWeight, x: LayerInput) -> str | None:
        """Needs a CPU and vLLM's CPU extension."""
        if weight.step.device.type != "cpu":
            return "needs the CPU"
        if weight.groups > 1:
            return "takes one step per channel"
        import vllm._custom_ops  # noqa: F401 (loads the extension)

        if not hasattr(torch.ops._C, "create_onednn_scaled_mm_handler"):
            return "this vLLM build has no oneDNN int8 product"
        return None

    def prepare(self, layer: Any, weight: IntegerWeight, x: LayerInput) -> None:
        """Pack the weight into oneDNN's own layout; the int8 tensor is not kept."""
        from vllm import _custom_ops

        zero_point = weight.zero_point
        if weight.bits == 8:
            q = weight.q
        else:  # q - zero_point of a 4-bit weight fits int8: no zero-point is left
            unpacked = unpack(weight.q, weight.bits, x.features)
            q = (unpacked.to(torch.int32) - zero_point.unsqueeze(1)).to(torch.int8)
            zero_point = torch.zeros_like(zero_point)
        layer.lrq_halved = weight.bits == 8 and not _multiplies_bytes_exactly()
        if layer.lrq_halved:
            half = q >> 1
            q = torch.cat([half, q - half])  # -64..63 and -64..64
        # Unit scales make the product return the sums themselves, in float32: exact below 2^24, else to 24 bits. oneDNN
        # keeps a bare pointer to the weight's scales, so they have to live as long as the product; a parameter would give way
        # to that of an earlier one where vLLM loads weights again.
        layer.lrq_unit_steps = torch.ones(q.shape[0], dtype=torch.float32)
        layer.lrq_unit_step = torch.ones(1, dtype=torch.float32)
        for name, value in (
            ("lrq_step", weight.step.clone()),
            ("lrq_zero_point", zero_point.float()),
            ("lrq_total", weight.total.float()),
        ):
            setattr(layer, name, Parameter(value, requires_grad=False))
        layer.lrq_has_zero_point = weight.bits == 8
        layer.lrq_product = _custom_ops.create_onednn_scaled_mm(
            q.t(), layer.lrq_unit_steps, torch.float32, dynamic_quant=False, use_azp=False
        )

    def linear(self, layer: Any, x: Tensor, grid: InputGrid, bias: Tensor | None) -> Tensor:
        """Plain torch quantizes; int32 sums in oneDNN, zero-points and steps in float32."""
        return self._multiply(layer, reference.quantize_input(x, grid), bias, x.dtype)

    def _multiply(self, layer: Any, x: QuantizedTokens, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        from vllm import _custom_ops

        sums = torch.empty((x.q.shape[0], layer.lrq_product.n), dtype=torch.float32)
        _custom_ops.onednn_scaled_mm(layer.lrq_product, x.q, sums, layer.lrq_unit_step, None, None, None)
        if layer.lrq_halved:
            sums = sums.unflatten(1, (2, -1)).sum(1)
        sums = sums - x.zero_point.float() * layer.lrq_total
        if layer.lrq_has_zero_point:
            sums = sums - x.total.float() * layer.lrq_zero_point
        y = sums * x.step * layer.lrq_step
        return (y if bias is None else y + bias.float()).to(out_dtype)


class CpuGroupsBackend:
    """The CPU, for steps of groups of inputs: 4-bit weights are unpacked to int8 at load, so they take 8 bits in memory."""

    name = "float32"

    def why_not(self, weight: IntegerWeight, x: LayerInput) -> str | None:
        """Needs a CPU and groups."""
        if weight.step.device.type != "cpu":
            return "needs the CPU"
        return None if weight.groups > 1 else "takes steps of groups of inputs"

    def prepare(self, layer: Any, weight: IntegerWeight, x: LayerInput) -> None:
        """q - zero_point, group by group."""
        q = unpack(weight.q, weight.bits, x.features).unflatten(1, (weight.groups, -1))
        centred = (q.to(torch.int32) - weight.zero_point.unsqueeze(2)).to(torch.int8)
        layer.lrq_centred = Parameter(centred.transpose(0, 1).contiguous(), requires_grad=False)
        layer.lrq_step = Parameter(weight.step.t().contiguous(), requires_grad=False)

    def linear(self, layer: Any, x: Tensor, grid: InputGrid, bias: Tensor | None) -> Tensor:
        """Plain torch quantizes; each group's whole numbers are summed up in float32."""
        from lrq_vllm.kernels import ops

        return ops.grouped_linear(*reference.quantize_input(x, grid), layer.lrq_centred, layer.lrq_step, bias, x.dtype)


class ReferenceBackend:
    """Any device: the definition itself."""

    name = REFERENCE

    def why_not(self, weight: IntegerWeight, x: LayerInput) -> str | None:
        """Has to be asked for."""
        return why_not_reference()

    def prepare(self, layer: Any, weight: IntegerWeight, x: LayerInput) -> None:
        """Keep the checkpoint's layout, and the column sums beside it."""
        _keep(layer, weight)

    def linear(self, layer: Any, x: Tensor, grid: InputGrid, bias: Tensor | None) -> Tensor:
        """Exact sums."""
        return exact_ops.integer_linear(x, grid.kind, list(grid.calibrated), *_kept(layer), bias)


def _keep(layer: Any, weight: IntegerWeight) -> None:
    """Put the weight on the layer as it is, as parameters."""
    for field in ("q", "step", "zero_point", "total"):
        value = getattr(weight, field).contiguous()
        setattr(layer, f"lrq_{field}", Parameter(value, requires_grad=False))
    layer.lrq_bits = weight.bits


def _kept(layer: Any) -> IntegerWeight:
    """What was put there."""
    return IntegerWeight(layer.lrq_q, layer.lrq_step, layer.lrq_zero_point, layer.lrq_total, layer.lrq_bits)


def _multiplies_bytes_exactly() -> bool:
    """Whether oneDNN's int8 product has instructions here that add in 32 bits, and its variables let it use them."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper() in _WITHOUT_VNNI:
        return False
    cpu = torch.cpu.get_capabilities()
    return any(cpu.get(name, False) for name in ("avx512_vnni", "avx_vnni"))
