"""y = x W^T with an arranged weight, on a Hopper GPU: the weight is streamed for few tokens, unpacked for many.

Twins: reference.quantize_per_token or quantize_static with reference.integer_linear; reference.weight_only_linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels import activation_quant, arranged_tiles, stream_linear
from lrq_vllm.kernels.arranged_weight import STRIPE, ArrangedWeight
from lrq_vllm.kernels.reference import QuantizedTokens

__all__ = ["Static", "arranged_linear", "unpacked_linear"]

Static = tuple[Tensor, Tensor]
"""The calibrated step (float32 [1]) and zero-point (uint8 [1]) of activations."""

# Up to here several passes over the packed weight take less time than writing it out once.
_STREAMED_TOKENS = 2 * stream_linear.MOST_TOKENS


def arranged_linear(x: Tensor, weight: ArrangedWeight, bias: Tensor | None, static: Static | None = None) -> Tensor:
    """y [T, N] for x [T, K], bfloat16 or float16. static: None quantizes x per token if ``weight.integer``."""
    if x.shape[0] > _STREAMED_TOKENS:
        return unpacked_linear(x, weight, bias, static)
    parts = [stream_linear.stream_linear(part, weight, bias, static) for part in x.split(stream_linear.MOST_TOKENS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpacked_linear(x: Tensor, weight: ArrangedWeight, bias: Tensor | None, static: Static | None = None) -> Tensor:
    """As :func:`arranged_linear`, by torch's matrix product (exact int32 sums of int8, or 16-bit floats), T > 16."""
    if not weight.integer:
        return torch.nn.functional.linear(x, arranged_tiles.unpacked_weight(weight, x.dtype), bias)
    tokens = activation_quant.quantize_static(x, *static) if static else activation_quant.quantize_per_token(x)
    return _scaled(torch._int_mm(tokens.q, arranged_tiles.unpacked_integers(weight).t()), tokens, weight, bias, x.dtype)


def _scaled(sums: Tensor, x: QuantizedTokens, weight: ArrangedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What reference.integer_linear makes of its products: sums int32 [T, N] of q_x q_w."""
    y = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    block = 1024
    _scale_kernel[(sums.shape[0], triton.cdiv(sums.shape[1], block))](
        sums, x.step, x.zero_point, x.total, weight.facts.view(torch.float32), weight.facts, bias, y, sums.shape[1],
        HAS_BIAS=bias is not None, ROWS=STRIPE, BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip
    return y


@triton.jit
def _scale_kernel(
    sums_ptr, x_step_ptr, x_zero_ptr, x_total_ptr, step_ptr, facts_ptr, bias_ptr, y_ptr, N,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    fact = n // ROWS * (3 * ROWS) + n % ROWS
    step = tl.load(step_ptr + fact, mask=inside, other=0.0)
    zero = tl.load(facts_ptr + fact + ROWS, mask=inside, other=0)
    total = tl.load(facts_ptr + fact + 2 * ROWS, mask=inside, other=0)
    sums = tl.load(sums_ptr + token * N + n, mask=inside, other=0)
    sums -= tl.load(x_zero_ptr + token) * total + zero * tl.load(x_total_ptr + token)
    y = sums.to(tl.float32) * tl.load(x_step_ptr + token) * step
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)
