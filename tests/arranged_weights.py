"""What the tests of the layout for Hopper GPUs and of its kernels share: random weights, and what counts as the same result."""

import torch
from torch import Tensor

from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, arrange
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid

# Bits, and whether activations are integers.
KINDS = [(8, True), (4, True), (4, False), (3, False)]
GROUPED_KINDS = [(4, True), (4, False), (3, False)]  # those of them that also have groups


class Weight:
    """A random weight over the whole grid, on ``device``: arranged, and as the reference takes it."""

    def __init__(
        self, bits: int, integer: bool, rows: int, columns: int, device: torch.device, group: int | None = None
    ) -> None:
        groups = columns // group if group else 1
        unsigned = torch.randint(0, 2**bits, (rows, columns)).to(device)
        zero_point = torch.randint(0, 2**bits, (rows, groups)).to(device, torch.uint8)
        zero_point[0], zero_point[-1] = 0, 2**bits - 1
        unsigned[0], unsigned[-1] = 2**bits - 1, 0  # the largest sums that there are
        step = (torch.rand(rows, groups) * 0.1 + 1e-3).to(device)
        step[1] = 0  # a channel of zeros
        self.stored = pack(unsigned, bits), step, zero_point
        self.bits, self.columns = bits, columns
        self.q = unsigned - (128 if bits == 8 else 0)
        self.integer = reference.integer_weight(*self.stored, bits, columns) if integer else None
        zero = zero_point.int() - (128 if bits == 8 else 0)
        total = None if self.integer is None else self.integer.total
        self.arranged: ArrangedWeight = arrange(self.q, step, zero, total, bits, integer=integer)

    def product(self, x: Tensor, bias: Tensor | None, grid: InputGrid = PER_TOKEN) -> Tensor:
        """What reference.py computes."""
        if self.integer is None:
            return reference.weight_only_linear(x, *self.stored, self.bits, bias)
        return reference.integer_linear(reference.quantize_input(x, grid), self.integer, bias, x.dtype)

    def most(self, x: Tensor, grid: InputGrid) -> Tensor:
        """float64 [T, N]: the product of the lengths of a token, as its integers stand, and an output's weights."""
        tokens = reference.quantize_input(x, grid)
        lengths = tokens.step.double() * tokens.q.double().norm(dim=1, keepdim=True)
        return lengths * reference.dequantize_weight(*self.stored, self.bits, self.columns).double().norm(dim=1)


def grids(device: torch.device, *, integer: bool) -> list[InputGrid]:
    """One of each kind; for 16-bit activations one that nothing reads."""
    static = torch.tensor([0.03], device=device), torch.tensor([117], dtype=torch.uint8, device=device)
    calibrated = [reference.static_grid(*static), reference.clipped_grid(torch.tensor([0.6], device=device))]
    return [PER_TOKEN, *calibrated] if integer else [PER_TOKEN]


def assert_sums_of_groups(found: Tensor, wanted: Tensor, most: Tensor) -> None:
    """Groups' integer sums are exact; they are added as floats, in some order: neighbours in found's dtype may change places,
    and where groups cancel out, 2^-20 of what they could have given at most is left (Weight.most).
    """
    step = torch.finfo(found.dtype).eps * wanted.double().abs()
    assert ((found == wanted) | ((found.double() - wanted.double()).abs() <= step + most * 2**-20)).all()


def assert_product(found: Tensor, wanted: Tensor, *, integer: bool) -> None:
    """Integer sums are exact, and so is what is made of them; float sums come in another order."""
    if integer:
        assert torch.equal(found, wanted)
    elif wanted.isfinite().all():
        assert (found.double() - wanted.double()).norm() <= 6e-3 * wanted.double().norm()
