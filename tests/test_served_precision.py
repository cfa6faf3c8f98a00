"""The reference path's emulation of a server's roundings, against vLLM's own operations on this machine's CPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lrq_offline import served_precision
from lrq_offline.cpu_attention import AMX, AVX2, AVX512, Instructions

truncates_here = served_precision._vllm_truncates  # as it is without any monkeypatch


def test_upper_half_rounds_towards_zero() -> None:
    x = torch.randn(1000)
    truncated, nearest = served_precision._upper_half(x), x.bfloat16().float()
    assert torch.equal(truncated, truncated.bfloat16().float())
    assert (truncated.abs() <= x.abs()).all()
    assert not torch.equal(truncated, nearest)
    assert torch.equal(served_precision._upper_half(nearest), nearest)
    assert torch.equal(served_precision._upper_half(nearest.view(50, 20).T), nearest.view(50, 20).T)


@pytest.mark.parametrize(
    ("machine", "cuda", "avx512", "avx512_bf16", "truncates"),
    [
        ("x86_64", False, True, True, False),  # vLLM loads _C
        ("x86_64", False, True, False, True),  # _C_AVX512
        ("x86_64", False, False, False, True),  # _C_AVX2
        ("aarch64", False, False, False, False),
        ("x86_64", True, False, False, False),
    ],
)
def test_truncation_follows_vllms_choice_of_an_extension(
    monkeypatch: pytest.MonkeyPatch, machine: str, cuda: bool, avx512: bool, avx512_bf16: bool, truncates: bool
) -> None:
    pretend(monkeypatch, machine, cuda, avx512=avx512, avx512_bf16=avx512_bf16)
    assert truncates_here() is truncates


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, cuda: bool, **supported: bool) -> None:
    """Let Python and torch say that this is such a machine."""

    def answer(value: object) -> Callable[[], object]:
        return lambda: value

    monkeypatch.setattr("platform.machine", answer(machine))
    monkeypatch.setattr("torch.cuda.is_available", answer(cuda))
    for name, value in supported.items():
        monkeypatch.setattr(f"torch.cpu._is_{name}_supported", answer(value))


@pytest.mark.parametrize(
    ("machine", "cuda", "avx512", "amx_tile", "dtype", "head_dim", "instructions"),
    [
        ("x86_64", False, True, True, torch.bfloat16, 64, AMX),
        ("x86_64", False, True, True, torch.float16, 64, AVX512),
        ("x86_64", False, True, True, torch.bfloat16, 80, AVX512),  # vLLM's tiles have rows of 32
        ("AMD64", False, True, False, torch.bfloat16, 64, AVX512),
        ("x86_64", False, False, False, torch.bfloat16, 64, AVX2),
        ("aarch64", False, False, False, torch.bfloat16, 64, None),
        ("x86_64", True, True, True, torch.bfloat16, 64, None),
    ],
)
def test_attention_follows_vllms_choice_of_instructions(
    monkeypatch: pytest.MonkeyPatch, machine: str, cuda: bool, avx512: bool, amx_tile: bool, dtype: torch.dtype, head_dim: int,
    instructions: Instructions | None,
) -> None:  # fmt: skip
    pretend(monkeypatch, machine, cuda, avx512=avx512, amx_tile=amx_tile)
    assert served_precision._instructions(dtype, head_dim) is instructions


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="the reference path rounds like vLLM on a CPU")
@pytest.mark.parametrize(("kind", "offset"), [("RMSNorm", 0.0), ("GemmaRMSNorm", 1.0)])
def test_vllms_norms_round_as_said(kind: str, offset: float) -> None:
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import layernorm

    x, gain = torch.randn(40, 256).bfloat16(), (torch.rand(256) + 0.5 - offset).bfloat16()
    with set_current_vllm_config(VllmConfig()):
        served = getattr(layernorm, kind)(256, eps=1e-6)
    served.weight.data = gain
    norm = SimpleNamespace(weight=nn.Parameter(gain.float()), variance_epsilon=1e-6)
    ours = served_precision._ServedNorm(norm, offset, torch.bfloat16)
    assert torch.equal(ours(x.float()), served.forward_native(x).float())


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="the reference path rounds like vLLM on a CPU")
def test_vllms_rotary_embedding_rounds_as_said() -> None:
    pytest.importorskip("vllm")
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    tokens, heads, width = 16, 3, 64
    q, k = (torch.randn(tokens, heads * width).bfloat16() for _ in range(2))
    angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    tables = torch.cat([angles.cos(), angles.sin()], dim=-1).bfloat16()

    def by_head(x: Tensor) -> Tensor:
        return x.float().view(1, tokens, heads, width).transpose(1, 2)

    cos, sin = (table.float().repeat(1, 2)[None] for table in tables.chunk(2, dim=-1))
    expected = apply_rotary_pos_emb(by_head(q), by_head(k), cos, sin)
    _custom_ops.rotary_embedding(torch.arange(tokens), q, k, width, tables, True)
    for served, exact in zip((q, k), expected, strict=True):
        rounded = served_precision._upper_half(exact) if truncates_here() else exact.bfloat16().float()
        assert torch.equal(by_head(served), rounded)
