"""The matrices that rotate inputs: what docs/checkpoint-format.md says of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrq_vllm.checkpoint import hadamard
from lrq_vllm.checkpoint.hadamard import paley_matrix, paley_order, paley_table, refill_tables, rotate
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels import hadamard as kernel
from lrq_vllm.kernels.rotate_tokens import rotate_tokens

SPECIFICATION = Path(__file__).parents[1] / "docs" / "checkpoint-format.md"


def signs(matrix: torch.Tensor) -> list[str]:
    return ["  ".join("+" if value > 0 else "-" for value in row) for row in matrix.tolist()]


def test_the_specification_shows_the_matrices_that_are_computed() -> None:
    text = SPECIFICATION.read_text()
    for row in signs(paley_matrix(4)):
        assert row in text
    product = rotate(torch.eye(8), 8, 4).T  # rows of the identity become columns of H
    for row in signs(product):
        assert row.replace("  ", " ") in text


# 12, 20, 24, 44 and 200 are type I; 28, 76, 148 and 924 are type II; 29,568 = 924 x 32 is the widest MLP in use.
@pytest.mark.parametrize("order", [4, 12, 20, 24, 28, 44, 76, 148, 200, 924])
def test_paley_matrices_are_hadamard_matrices(order: int) -> None:
    matrix = paley_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


# MLP widths of Llama 3 8B, Qwen2.5 7B and 72B, Qwen3 8B, Llama 2 13B, and of the models in tests and benches.
@pytest.mark.parametrize(
    ("block", "order"),
    [(14336, 28), (18944, 148), (29568, 924), (12288, 12), (13824, 108), (768, 12), (1408, 44), (4096, 1), (1, 1)],
)
def test_the_order_is_the_smallest_that_exists(block: int, order: int) -> None:
    assert paley_order(block) == order


@pytest.mark.parametrize("block", [3, 6, 11008, 2 * 27, 4 * 1021])
def test_a_block_without_a_matrix_has_no_order(block: int) -> None:
    assert paley_order(block) is None


@given(blocks=st.integers(1, 3), order=st.sampled_from([1, 4, 12, 28]), power=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_rotation_is_its_definition_and_keeps_lengths(blocks: int, order: int, power: int, seed: int) -> None:
    sylvester = torch.ones(1, 1)
    for _ in range(power):
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    block = order * 2**power
    whole = torch.kron(torch.eye(blocks), torch.kron(paley_matrix(order), sylvester)) / block**0.5
    x = torch.randn(2, 3, blocks * block, generator=torch.Generator().manual_seed(seed))
    rotated = rotate(x, block, order)
    torch.testing.assert_close(rotated, x @ whole.T)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


# Of one factor of Sylvester's, of two, of Paley's, and of all; the widths of MLPs among them.
KERNEL_BLOCKS = [(64, 1), (512, 1), (16384, 1), (192, 12), (768, 12), (14336, 28)]


def inputs_with_outliers(tokens: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Two blocks of each token, in rows of more."""
    x = torch.randn(tokens, 2 * block + 8)
    x[1, ::50] *= 100  # what rotations are for
    return x.to(dtype)[:, : 2 * block]


def assert_rotated(found: torch.Tensor, x: torch.Tensor, block: int, order: int) -> None:
    """But for one rounding to 16 bits (the interpreter cuts off where a GPU rounds), and what sums of float32 leave."""
    wanted, bits = rotate(x, block, order), 8 if x.dtype == torch.bfloat16 else 11
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.float(), wanted, rtol=2 ** (1 - bits), atol=2**-18 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("block", "order"), KERNEL_BLOCKS)
def test_the_kernel_rotates_as_the_definition_does(device: torch.device, block: int, order: int, dtype: torch.dtype) -> None:
    kernel.check(block, order, device, hopper=False)
    x = inputs_with_outliers(3, block, dtype)
    assert_rotated(kernel.rotate(x.to(device), block, order).cpu(), x, block, order)


# Butterflies of 4 to 14 bits; Paley's matrices of one to ten rows of tensor-core tiles; what fills shared memory.
HOPPER_BLOCKS = [
    *KERNEL_BLOCKS, (16, 1), (32, 1), (1408, 44), (8192, 1), (13824, 108), (18944, 148), (24576, 12), (32256, 252),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("block", "order"), HOPPER_BLOCKS)
def test_the_kernel_for_hopper_rotates_as_the_definition_does(block: int, order: int, dtype: torch.dtype) -> None:
    kernel.check(block, order, torch.device("cuda"), hopper=True)
    x = inputs_with_outliers(150, block, dtype)
    assert_rotated(rotate_tokens(x.cuda(), block, order).cpu(), x, block, order)
    assert rotate_tokens(x[:0].cuda(), block, order).shape == (0, 2 * block)


@pytest.mark.parametrize(("block", "order"), [(96, 12), (29568, 924), (2**17, 1)])
def test_a_block_that_the_kernel_does_not_take_is_refused(block: int, order: int) -> None:
    with pytest.raises(SettingsError, match=f"rotates {block} inputs .*--no-rotate"):
        kernel.check(block, order, torch.device("cpu"), hopper=False)


def test_a_block_that_takes_more_shared_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(kernel, "_shared_bytes", lambda device: 166912)
    kernel.check(14336, 28, gpu, hopper=False)
    with pytest.raises(SettingsError, match="needs 393216 bytes of shared memory, and this GPU has 166912"):
        kernel.check(18944, 148, gpu, hopper=False)
    kernel.check(18944, 148, gpu, hopper=True)


def test_a_default_dtype_changes_no_matrix() -> None:
    wanted = paley_matrix(28)
    paley_matrix.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        assert paley_matrix(28).dtype == torch.float32 and torch.equal(paley_matrix(28), wanted)
        assert paley_matrix(12).dtype == paley_matrix(1).dtype == torch.float32
        hadamard._tables.clear()
        assert paley_table(12, 16, torch.float32, torch.device("cpu")).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_default_device_holds_no_matrix() -> None:
    paley_matrix.cache_clear()
    with torch.device("meta"):  # vLLM builds a model on its GPU so
        matrices = [paley_matrix(order) for order in (1, 12, 28)]
    assert all(matrix.device.type == "cpu" for matrix in matrices)


def test_tables_that_lost_their_values_get_them_back_in_their_place() -> None:
    hadamard._tables.clear()
    with torch.inference_mode():  # as vLLM serves
        tables = [paley_table(order, 32, torch.bfloat16, torch.device("cpu")) for order in (12, 28)]
    wanted = [table.clone() for table in tables]
    for table in tables:
        table.fill_(torch.nan)
    refill_tables()
    assert all(torch.equal(table, before) for table, before in zip(tables, wanted, strict=True))
    assert wanted[0][:12, :12].abs().min() == 1 and not wanted[0][12:].any() and not wanted[0][:, 12:].any()


def test_a_rotation_is_computed_in_float32_whatever_surrounds_it() -> None:
    x = torch.randn(4, 48).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rotate(x, 48, 12)
    assert inside.dtype == torch.float32 and torch.equal(inside, rotate(x, 48, 12))
