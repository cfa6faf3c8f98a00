"""Norms of a compiled model on a CPU: torch's own sums, unless the user has chosen otherwise."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm")

from vllm import ir
from vllm.config.kernel import IrOpPriorityConfig, KernelConfig

from lrq_vllm.cpu_norms import offer_whole_norms, take_whole_norms
from tests.vllm_layers import whole_graph

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's norms are vLLM's own kernels")]
NORMS = {"rms_norm": 1, "fused_add_rms_norm": 2}
"""How many tensors of tokens each reads."""


@pytest.fixture(autouse=True)
def defaults_afterwards() -> Iterator[None]:
    yield
    IrOpPriorityConfig.with_default(["native"]).set_default()


def providers() -> list[list[str]]:
    return [getattr(ir.ops, name).get_priority() for name in NORMS]


def test_vllms_default_becomes_the_whole_norms_and_offering_them_twice_changes_nothing() -> None:
    for _ in range(2):
        offer_whole_norms()
        take_whole_norms(KernelConfig(ir_op_priority=IrOpPriorityConfig.with_default(["native"])))
        assert providers() == [["lrq"], ["lrq"]]


def test_what_the_user_has_chosen_stays() -> None:
    offer_whole_norms()
    chosen = IrOpPriorityConfig.with_default(["native"], rms_norm=["vllm_c", "native"])
    take_whole_norms(KernelConfig(ir_op_priority=chosen))
    assert providers() == [["native"], ["lrq"]] and chosen.rms_norm == ["vllm_c", "native"]


@pytest.mark.parametrize("name", NORMS)
def test_compiled_they_put_out_the_bits_of_vllms_norms_uncompiled(name: str) -> None:
    offer_whole_norms()
    norm = getattr(ir.ops, name)
    tokens = [torch.randn(500, 256).bfloat16() for _ in range(NORMS[name])]
    gain = (torch.rand(256) + 0.5).bfloat16()
    outputs = [
        function(*tokens, gain, 1e-6) for function in (norm.impls["native"].impl_fn, whole_graph(norm.impls["lrq"].impl_fn))
    ]
    uncompiled, compiled = (output if isinstance(output, tuple) else (output,) for output in outputs)
    assert len(compiled) == NORMS[name]
    assert all(torch.equal(*pair) for pair in zip(uncompiled, compiled, strict=True))
