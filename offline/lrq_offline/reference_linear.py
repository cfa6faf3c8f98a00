"""A quantized linear layer in plain torch, from the tensors of a checkpoint: what its integers mean."""

import torch
from torch import Tensor, nn

from lrq_vllm.checkpoint.hadamard import rotate
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.kernels import reference
from lrq_vllm.layer_input import input_grid, input_kind

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
        weight = (self.qweight, self.weight_step, self.weight_zero_point)
        if self._activation is None:
            y = reference.weight_only_linear(flat, *weight, self._bits, self.bias)
        else:
            integers = reference.integer_weight(*weight, self._bits, self._in_features)
            tokens = reference.quantize_input(flat, input_grid(input_kind(self._activation), self))
            y = reference.integer_linear(tokens, integers, self.bias, x.dtype)
        y = reference.add_low_rank(y, flat, [(self.low_rank_u, self.low_rank_v)] if self._corrected else [])
        return y.view(*x.shape[:-1], -1)
