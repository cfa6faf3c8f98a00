"""Weights of 8, 4, 3 and 2 bits in words, held to literal bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrq_vllm.checkpoint.packing import STORED_BITS, pack, packed_width, storage_dtype, unpack, values_per_group
from tests.small_checkpoint import GOLDEN_ROWS


def stored_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def random_integers(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


@given(bits=st.sampled_from(STORED_BITS), rows=st.integers(1, 4), columns=st.integers(1, 101), seed=st.integers(0, 999))
def test_packing_round_trips_every_width(bits: int, rows: int, columns: int, seed: int) -> None:
    q = random_integers(rows, columns, bits, seed)
    stored = pack(q, bits)
    assert (stored.dtype, tuple(stored.shape)) == (storage_dtype(bits), (rows, packed_width(columns, bits)))
    assert torch.equal(unpack(stored, bits, columns), q.to(torch.uint8))


@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize("value", [0, -1], ids=["lowest", "highest"])
def test_packing_round_trips_the_ends_of_the_grid(bits: int, value: int) -> None:
    q = torch.full((2, 67), value % 2**bits, dtype=torch.uint8)
    assert torch.equal(unpack(pack(q, bits), bits, 67), q)


@pytest.mark.parametrize(("bits", "row", "expected"), GOLDEN_ROWS)
def test_packed_rows_are_these_bytes(bits: int, row: list[int], expected: str) -> None:
    assert stored_bytes(pack(torch.tensor([row]), bits)) == bytes.fromhex(expected)


@pytest.mark.parametrize(("bits", "row", "expected"), GOLDEN_ROWS)
def test_these_bytes_unpack_to_the_rows(bits: int, row: list[int], expected: str) -> None:
    stored = torch.frombuffer(bytearray.fromhex(expected), dtype=storage_dtype(bits)).unsqueeze(0)
    assert unpack(stored, bits, len(row)).tolist() == [row]


@pytest.mark.parametrize(("bits", "width"), [(4, 1), (3, 3), (2, 1)])
def test_packing_pads_a_short_row_with_zero_bits(bits: int, width: int) -> None:
    stored = pack(torch.full((1, 1), 2**bits - 1), bits)
    ones = sum(bin(byte).count("1") for byte in stored_bytes(stored))
    assert (stored.shape[1], ones) == (width, bits)


@pytest.mark.parametrize("bits", STORED_BITS)
def test_a_packed_row_can_be_cut_at_every_whole_group(bits: int) -> None:
    group, columns = values_per_group(bits), 4 * values_per_group(bits)
    q = random_integers(3, columns, bits)
    stored = pack(q, bits)
    for cut in range(group, columns, group):
        at = packed_width(cut, bits)
        assert torch.equal(stored[:, :at], pack(q[:, :cut], bits))
        assert torch.equal(stored[:, at:], pack(q[:, cut:], bits))
