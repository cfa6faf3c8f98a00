"""A quantized linear layer in plain torch, from the tensors of a checkpoint: what its integers mean."""

import torch
from torch import Tensor, nn

from lrq_vllm.checkpoint.affine import clipped_token_step_and_zero_point, quantize
from lrq_vllm.checkpoint.hadamard import rotate
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.kernels import reference

__all__ = ["ReferenceLinear"]


class ReferenceLinear(nn.Module):
    """A quantized linear layer from its stored tensors (buffers named as in the checkpoint), per lrq_vllm's reference."""

    qweight: Tensor
    weight_step: Tensor
    weight_zero_point: Tensor
    input_step: Tensor
    input_zero_point: Tensor
    input_clip: Tensor
    low_rank_u: Tensor
    low_rank_v: Tensor

    def __init__(self, manifest: Manifest, module: str, bias: Tensor | None) -> None:
        super().__init__()
        self._bits = manifest.weight.bits
        self._in_features = manifest.quantized[module][1]
        self._activation = manifest.activation
        hadamard = manifest.online_hadamard
        self._hadamard = hadamard if hadamard is not None and module in hadamard.modules else None
        self._corrected = manifest.correction is not None and module in manifest.correction.rank
        for suffix, spec in manifest.tensors_of(module).items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        flat = x.reshape(-1, self._in_features)
        if self._hadamard is not None:
            flat = rotate(flat, self._hadamard.block, self._hadamard.order).to(x.dtype)
        if not self._corrected:
            return self._product(flat, self.bias, x.dtype).view(*x.shape[:-1], -1)
        # The sum is rounded once.
        y = self._product(flat, None, torch.float32) + self._correction(flat)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype).view(*x.shape[:-1], -1)

    def _correction(self, x: Tensor) -> Tensor:
        """U (V^T x) [tokens, out] in float32; V^T x is rounded to x's dtype."""
        inner = (x.float() @ self.low_rank_v.float()).to(x.dtype)
        return inner.float() @ self.low_rank_u.float().T

    def _product(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """W_hat Q(x) + bias [tokens, out] in ``dtype``."""
        weight = (self.qweight, self.weight_step, self.weight_zero_point)
        if self._activation is None:
            if dtype == x.dtype:
                return reference.weight_only_linear(x, *weight, self._bits, bias)
            expanded = reference.dequantize_weight(*weight, self._bits, self._in_features).to(x.dtype)
            return nn.functional.linear(x.to(dtype), expanded.to(dtype), bias)
        integers = reference.integer_weight(*weight, self._bits, self._in_features)
        return reference.integer_linear(self._tokens(x), integers, bias, dtype)

    def _tokens(self, x: Tensor) -> reference.QuantizedTokens:
        assert self._activation is not None
        if self._activation.static:
            return reference.quantize_static(x, self.input_step, self.input_zero_point)
        if not self._activation.symmetric:
            return reference.quantize_per_token(x)
        step, zero_point = clipped_token_step_and_zero_point(x, self.input_clip, self._activation.bits)
        q = (quantize(x, step, zero_point, self._activation.bits) - zero_point).to(torch.int8)
        return reference.QuantizedTokens(
            q, step, torch.zeros_like(step, dtype=torch.int32), q.sum(dim=1, keepdim=True, dtype=torch.int32)
        )
