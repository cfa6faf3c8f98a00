"""The product of a low-rank correction as a GPU takes it, against reference.py."""

import pytest
import torch
from torch import Tensor

from lrq_vllm.kernel_choice import TRITON
from lrq_vllm.kernels import low_rank, reference
from lrq_vllm.low_rank import choose_low_rank

# Of layers of one, two and three parts: widths, and ranks that are no multiples of 16; a part may have none.
PARTS = [([200], [33]), ([512, 512], [60, 60]), ([1024, 256, 256], [410, 103, 0]), ([96], [700])]


def pairs_of(widths: list[int], ranks: list[int], inputs: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """U and V that keep the size of activations."""
    return [
        ((torch.randn(width, rank) * max(rank, 1) ** -0.5).to(dtype), (torch.randn(inputs, rank) * inputs**-0.5).to(dtype))
        for width, rank in zip(widths, ranks, strict=True)
    ]


def assert_added(
    widths: list[int], ranks: list[int], inputs: int, tokens: int, dtype: torch.dtype, device: str, *, hopper: bool = False
) -> None:
    """Within a rounding of y, and what one of V^T x makes when it falls to the other side."""
    pairs = pairs_of(widths, ranks, inputs, dtype)
    x, y = torch.randn(tokens, 2 * inputs).to(dtype)[:, :inputs], torch.randn(tokens, sum(widths)).to(dtype)
    factors = low_rank.arrange([(u.to(device), v.to(device)) for u, v in pairs], dtype)
    found = y.to(device).clone()
    low_rank.add_low_rank_(found, x.to(device), factors, hopper=hopper)
    ulp = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(found.cpu().float(), reference.add_low_rank(y, x, pairs).float(), rtol=2 * ulp, atol=4 * ulp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("widths", "ranks"), PARTS)
def test_what_is_added_in_place_is_the_reference_product(
    widths: list[int], ranks: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    for tokens in (0, 1, 40):
        assert_added(widths, ranks, 96, tokens, dtype, device.type)


def test_a_layer_that_does_not_run_on_our_kernels_is_corrected_without_them() -> None:
    pairs, layer = pairs_of([48, 16], [10, 3], 64, torch.bfloat16), torch.nn.Module()
    x, y = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    correction = choose_low_rank(torch.device("cuda"), TRITON)
    correction.prepare(layer, pairs, torch.bfloat16)
    found = correction.add(layer, y.clone(), x)
    torch.testing.assert_close(found, reference.add_low_rank(y, x, pairs), rtol=2**-7, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [512, 4096, 14336, 1032])
@pytest.mark.parametrize(("widths", "ranks"), [*PARTS, ([4096], [1229])])
def test_few_tokens_give_the_reference_product(widths: list[int], ranks: list[int], inputs: int, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 7, 8, 9, 16):
        assert_added(widths, ranks, inputs, tokens, dtype, "cuda", hopper=True)
