"""Make a reference model round where a 16-bit server rounds, so that the two can be compared to the last bit.

The model keeps computing in float32; a value is rounded to the server's dtype wherever a server writes it out: after
every linear layer, norm, activation function and attention, after each step of capping the logits, and in the residual
stream. The one place that needs care is
the residual addition: vLLM's fused add-and-normalize rounds the sum for the residual stream, and normalizes the sum as it
was before. Where no norm reads the residual stream, all that reads it reads the rounded sum. Attention weights stay in
float32, but on CPUs with AMX (cpu_attention.py, which also adds up in vLLM's order on x86 CPUs).

Integer layers depend on it: where rounding noise flips one 8-bit activation in a thousand, the difference grows block by
block until it is as large as the quantization error itself.

For the same reason it matters which CPU serves. vLLM's own C++ operations, here the rotary embedding and the attention,
convert float32 to bfloat16 by the AVX512-BF16 instructions, to nearest. The extensions that it loads on x86 CPUs without
them (``_C_AVX2``, ``_C_AVX512``) keep the upper 16 bits: they round towards zero. All else is torch's and oneDNN's, and
rounds to nearest on every machine.
"""

import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lrq_offline.attention import plain_attention, use_attention
from lrq_offline.cpu_attention import AMX, AVX2, AVX512, Instructions, cpu_attention
from lrq_offline.decoder_blocks import Family, blocks_of
from lrq_offline.experts import Experts
from lrq_offline.fused_norms import epsilon_of

__all__ = ["round_like_a_server", "served_dtype"]


def served_dtype(raw_config: Mapping[str, Any]) -> torch.dtype:
    """In which dtype a server runs the model of a config.json: its own, or bfloat16 for a float32 model."""
    return torch.float16 if "float16" in (raw_config.get("dtype"), raw_config.get("torch_dtype")) else torch.bfloat16


def round_like_a_server(model: PreTrainedModel, family: Family, dtype: torch.dtype, exact_attention: bool = False) -> None:
    """Add the roundings of a server that runs in ``dtype`` to a float32 model, in place.

    exact_attention: add up attention's products in float64 before they are rounded. A server that sums up in an order of its
    own rounds a few the other way, as that does.
    """

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def written(x: Tensor) -> Tensor:
        """x as vLLM's C++ operations write it."""
        return _upper_half(x) if dtype == torch.bfloat16 and _vllm_truncates() else rounded(x)

    rotated = rounded if family.float32_rotary else written

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        *, scaling: float, softcap: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        # q and k come from the rotary embedding. v comes from its linear layer: rounded there, it stays as it is.
        q, k, v = rotated(q), rotated(k), written(v)
        instructions = _instructions(dtype, q.shape[-1])
        if instructions is not None:
            output = cpu_attention(q, k, v, mask, scaling, softcap, instructions=instructions, exact_sums=exact_attention)
        elif exact_attention:
            output = plain_attention(q.double(), k.double(), v.double(), mask, scaling, softcap).float()
        else:
            output = plain_attention(q, k, v, mask, scaling, softcap)
        return written(output), None

    use_attention(model.config, "lrq_served", attention)
    for name, module in model.named_modules():
        if _is_linear(module):
            module.register_forward_pre_hook(lambda module, inputs: (_as_input(module, inputs[0].to(dtype)),))
            module.register_forward_hook(lambda module, inputs, output: rounded(output))
        elif name == family.rotary and not family.float32_rotary:
            module.register_forward_hook(lambda module, inputs, output: tuple(rounded(table) for table in output))
        elif family.experts is not None and name.endswith(f".{family.experts.router}"):
            _round_products(module, rounded)
        elif isinstance(module, Experts) or name.endswith(family.activation_functions):
            module.register_forward_hook(lambda module, inputs, output: rounded(output))
            if isinstance(module, Experts) and _routes_in_16_bits():
                module.register_forward_pre_hook(lambda module, inputs: (*inputs[:2], rounded(inputs[2])))
    _round_embedding(model.get_submodule(family.embedding), rounded)
    _round_capped_logits(model, rounded)
    _replace_norm(model, family.final_norm, family, dtype)
    if not family.norms_read_residual:
        model.get_submodule(family.final_norm).register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
    for block in blocks_of(model, family):
        for name in family.norms:
            _replace_norm(block, name, family, dtype)
        for reader, joiner in family.residual:
            addition = _ResidualAddition(dtype)
            block.get_submodule(reader).register_forward_pre_hook(addition.before, with_kwargs=True)
            block.get_submodule(joiner).register_forward_hook(addition.after)


def _round_embedding(embedding: Any, rounded: Callable[[Tensor], Tensor]) -> None:
    """Where a family scales its embedding, the server rounds the scale and then the product."""
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = rounded(embedding.embed_scale)
        embedding.register_forward_hook(lambda module, inputs, output: rounded(output))


def _round_capped_logits(model: PreTrainedModel, rounded: Callable[[Tensor], Tensor]) -> None:
    """Cap the logits, in a family that does, where they are computed: the model itself would round nowhere on the way."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        model.config.final_logit_softcapping = None
        head: Any = model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: rounded(rounded(rounded(output / cap).tanh()) * cap))


def _vllm_truncates() -> bool:
    """Whether vLLM's C++ operations round to bfloat16 towards zero on this machine.

    Asks what vLLM's ``CpuPlatform.import_kernels`` asks to choose its extension.
    """
    return _on_x86() and not (torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported())


def _instructions(dtype: torch.dtype, head_dim: int) -> Instructions | None:
    """What vLLM's attention computes with on this machine; None if it is no x86 CPU.

    Asks what vLLM's ``CpuPlatform.import_kernels`` asks to choose its extension, and its ``_get_attn_isa``, with blocks of its
    usual sizes.
    """
    if not _on_x86():
        return None
    if dtype == torch.bfloat16 and head_dim % 32 == 0 and torch.cpu._is_amx_tile_supported():
        return AMX
    return AVX512 if torch.cpu._is_avx512_supported() else AVX2


def _on_x86() -> bool:
    return not torch.cuda.is_available() and platform.machine().lower() in ("x86_64", "amd64")


def _routes_in_16_bits() -> bool:
    """Whether vLLM's router computes the experts' shares in the model's dtype, as on CPUs; others have 32 bits."""
    return not torch.cuda.is_available()


def _upper_half(x: Tensor) -> Tensor:
    """float32 x rounded to bfloat16 towards zero, as float32."""
    return (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "qweight")


def _as_input(module: nn.Module, x: Tensor) -> Tensor:
    """A quantized layer is defined by its input's dtype; a float one multiplies the same values in float32."""
    return x if hasattr(module, "qweight") else x.float()


class _ServedNorm(nn.Module):
    """RMSNorm as a server computes it: the input as it is, the normalized value and the product with the gain rounded.

    A gain that is a sum stays in float32, and so does what it is multiplied with.
    """

    def __init__(self, norm: Any, gain_offset: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self._epsilon = epsilon_of(norm)
        self._offset = gain_offset
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width], not rounded yet, to [..., width]."""
        normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._epsilon)
        if self._offset == 0:
            normalized = normalized.to(self._dtype).float()
        return (normalized * (self.weight + self._offset)).to(self._dtype).float()


class _RoundedProducts(TorchFunctionMode):
    """Rounds what ``torch.nn.functional.linear`` returns."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounded = rounded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._rounded(result) if func is nn.functional.linear else result


def _round_products(router: nn.Module, rounded: Callable[[Tensor], Tensor]) -> None:
    """A router multiplies by a weight of its own, and goes on to choose: what it chooses by has 16 bits."""
    forward = router.forward

    def called(*args: Any, **keywords: Any) -> Any:
        with _RoundedProducts(rounded):
            return forward(*args, **keywords)

    router.__dict__["forward"] = called


def _replace_norm(parent: nn.Module, name: str, family: Family, dtype: torch.dtype) -> None:
    parent.set_submodule(name, _ServedNorm(parent.get_submodule(name), family.gain_offset, dtype))


class _ResidualAddition:
    """Hooks on what reads the residual stream and what joins it: the block adds to a sum that a server has rounded by then."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._rounding = torch.zeros(())

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        """Note by how much rounding moves the sum that ``module`` is given."""
        x = inputs[0] if inputs else keywords["hidden_states"]
        self._rounding = x.to(self._dtype).float() - x

    def after(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The output, moved by as much."""
        if isinstance(output, tuple):  # attention also returns its weights
            return (output[0] + self._rounding, *output[1:])
        return output + self._rounding
