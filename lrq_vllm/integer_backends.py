"""Who multiplies integers on which device. Each backend computes the scheme exactly, or says why it cannot run."""

import platform
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm.checkpoint.packing import unpack
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens

__all__ = ["IntegerBackend", "OneDnnBackend", "TritonBackend", "choose_integer_backend"]


class IntegerBackend(Protocol):
    """Quantizes activations and multiplies them with a prepared weight; signatures follow kernels/reference.py."""

    name: str

    def why_not(self, device: torch.device) -> str | None:
        """The reason why this backend cannot run here, or None if it can."""

    def prepare(self, layer: Any, weight: IntegerWeight) -> None:
        """Put the weight on the layer in this backend's layout, as parameters."""

    def quantize_per_token(self, x: Tensor) -> QuantizedTokens:
        """x [tokens, in] with a step for each token."""

    def quantize_static(self, x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
        """x [tokens, in] with one calibrated step."""

    def multiply(self, layer: Any, x: QuantizedTokens, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """y [tokens, out]."""


def choose_integer_backend(device: torch.device) -> IntegerBackend:
    """The first backend that can run on ``device``. Raises SettingsError with every backend's reason if none can."""
    reasons = []
    backends: tuple[IntegerBackend, ...] = (TritonBackend(), OneDnnBackend())
    for backend in backends:
        reason = backend.why_not(device)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise SettingsError(
        f"No integer kernel runs on {device} ({'; '.join(reasons)}). Serve on an NVIDIA GPU of the Ampere generation or "
        "later, or on an x86 CPU with vLLM's CPU build."
    )


class TritonBackend:
    """Our Triton kernels, as opaque ops: they survive torch.compile and CUDA graphs. 4-bit weights stay packed."""

    name = "triton int8"

    def why_not(self, device: torch.device) -> str | None:
        """Needs CUDA."""
        return None if device.type == "cuda" else "needs a CUDA device"

    def prepare(self, layer: Any, weight: IntegerWeight) -> None:
        """Keep the checkpoint's layout, and the column sums beside it."""
        for field in ("q", "step", "zero_point", "total"):
            value = getattr(weight, field).contiguous()
            setattr(layer, f"lrq_{field}", Parameter(value, requires_grad=False))
        layer.lrq_bits = weight.bits

    def quantize_per_token(self, x: Tensor) -> QuantizedTokens:
        """One program per token."""
        from lrq_vllm.kernels import ops

        return QuantizedTokens(*ops.quantize_per_token(x))

    def quantize_static(self, x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
        """One program per token."""
        from lrq_vllm.kernels import ops

        return QuantizedTokens(*ops.quantize_static(x, step, zero_point))

    def multiply(self, layer: Any, x: QuantizedTokens, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """int8 tensor cores; exact int32 sums."""
        from lrq_vllm.kernels import ops

        weight = (layer.lrq_q, layer.lrq_step, layer.lrq_zero_point, layer.lrq_total)
        return ops.integer_linear(*x, *weight, bias, layer.lrq_bits, out_dtype)


class OneDnnBackend:
    """The CPU: integer sums from vLLM's oneDNN int8 product, the rest as the reference does it, in the same order.

    torch.compile fuses the quantization with what stands before the layer and the scaling with what follows; vLLM's own
    CPU quantizer rounds differently. 4-bit weights are unpacked to int8 at load, so they take 8 bits in memory.

    x86 CPUs without VNNI add products of bytes in pairs, in 16 bits that saturate: 255 * 127 * 2 does not fit. There an
    8-bit weight is multiplied as two halves of 7 bits, whose pairs do fit, and takes 16 bits in memory.
    """

    name = "oneDNN int8"

    def why_not(self, device: torch.device) -> str | None:
        """Needs a CPU and vLLM's CPU extension."""
        if device.type != "cpu":
            return "needs the CPU"
        import vllm._custom_ops  # noqa: F401 (loads the extension)

        if not hasattr(torch.ops._C, "create_onednn_scaled_mm_handler"):
            return "this vLLM build has no oneDNN int8 product"
        return None

    def prepare(self, layer: Any, weight: IntegerWeight) -> None:
        """Pack the weight into oneDNN's own layout; the int8 tensor is not kept."""
        from vllm import _custom_ops

        zero_point = weight.zero_point
        if weight.bits == 8:
            q = weight.q
        else:  # q - zero_point of a 4-bit weight fits int8: no zero-point is left
            unpacked = unpack(weight.q, weight.bits, layer.lrq_in_features)
            q = (unpacked.to(torch.int32) - zero_point.unsqueeze(1)).to(torch.int8)
            zero_point = torch.zeros_like(zero_point)
        layer.lrq_halved = weight.bits == 8 and not _multiplies_bytes_exactly()
        if layer.lrq_halved:
            half = q >> 1
            q = torch.cat([half, q - half])  # -64..63 and -64..64
        # Unit scales make the product return the sums themselves, in float32: exact below 2^24, else to 24 bits. oneDNN
        # keeps a bare pointer to the weight's scales, so they have to live as long as the layer.
        for name, value in (
            ("lrq_unit_steps", torch.ones(q.shape[0], dtype=torch.float32)),
            ("lrq_unit_step", torch.ones(1, dtype=torch.float32)),
            ("lrq_step", weight.step.clone()),
            ("lrq_zero_point", zero_point.float()),
            ("lrq_total", weight.total.float()),
        ):
            setattr(layer, name, Parameter(value, requires_grad=False))
        layer.lrq_has_zero_point = weight.bits == 8
        layer.lrq_product = _custom_ops.create_onednn_scaled_mm(
            q.t(), layer.lrq_unit_steps, torch.float32, dynamic_quant=False, use_azp=False
        )

    def quantize_per_token(self, x: Tensor) -> QuantizedTokens:
        """Plain torch."""
        return reference.quantize_per_token(x)

    def quantize_static(self, x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
        """Plain torch."""
        return reference.quantize_static(x, step, zero_point)

    def multiply(self, layer: Any, x: QuantizedTokens, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """int32 sums in oneDNN, zero-points and steps in float32."""
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


def _multiplies_bytes_exactly() -> bool:
    """Whether oneDNN's int8 product has instructions here that add in 32 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    cpu = torch.cpu.get_capabilities()
    return any(cpu.get(name, False) for name in ("avx512_vnni", "avx_vnni"))
