"""What is learned about a weight: the scale at which each of its elements is rounded.

    W_hat = s1 * (clamp(round(W / (s1 * exp(S2))) + z, 0, 2^b - 1) - z)

FlexRound (arXiv 2306.00317): S2 is a full matrix plus a row vector r.
LRQ (arXiv 2407.11534, section 2): S2 = L U + r + c, with L [out, k] and U [k, in]. Renewing the factors now and
then (as ReLoRA, arXiv 2307.05695, does) makes it S2 = M + L U + r + c, where M is the sum of the earlier factors' L U, fading.
Both start at S2 = 0, that is, at round-to-nearest. Only s1, z and the integers outlive the learning.
"""

import math

import torch
from torch import Tensor, nn

from lrq_offline.fake_quant_weight import LogScale, fake_quant_weight, integers
from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize

__all__ = ["FixedRounding", "FlexRoundScale", "LearnedRounding", "LrqScale", "Rounding"]


class Rounding(nn.Module):
    """One weight W [out, in] under quantization; calling it gives W_hat [out, in] in the dtype of the block's products."""

    def quantized(self) -> tuple[Tensor, StepAndZeroPoint]:
        """Integers uint8 [out, in] on the unsigned grid, with steps and zero-points float32 [out, groups]."""
        raise NotImplementedError


class FixedRounding(Rounding):
    """Integers that are decided: by round-to-nearest, by GPTQ, or by learning that has ended. W_hat is computed once."""

    def __init__(self, q: Tensor, quantizer: StepAndZeroPoint, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("step", quantizer.step)
        self.register_buffer("zero_point", quantizer.zero_point)
        grouped = q.unflatten(1, (quantizer.step.shape[1], -1))
        self._weight = dequantize(grouped, *(t.unsqueeze(2) for t in quantizer)).flatten(1).to(dtype)

    def forward(self) -> Tensor:
        """W_hat [out, in]."""
        return self._weight

    def quantized(self) -> tuple[Tensor, StepAndZeroPoint]:
        """The integers as they were given."""
        return self.get_buffer("q"), StepAndZeroPoint(self.get_buffer("step"), self.get_buffer("zero_point"))


class LearnedRounding(Rounding):
    """A weight whose step s1 (as its logarithm) and log-scale S2 are learned; the zero-point stays.

    weight: W [out, in], kept in its dtype. initial: steps and zero-points [out, groups]. dtype: of W_hat and of the
    matrix product in S2; everything else is float32, also under autocast.
    """

    weight: Tensor
    zero_point: Tensor
    whole_factor: Tensor | None = None
    """All rows of :meth:`factor` in ``dtype``, where somebody has brought them together already."""

    def __init__(self, weight: Tensor, initial: StepAndZeroPoint, bits: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.bits = bits
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("zero_point", initial.zero_point.float())
        self.log_step = nn.Parameter(initial.step.float().log())

    def log_scale(self) -> LogScale:
        """S2 in its parts. Methods define this."""
        raise NotImplementedError

    def matrix_parameters(self) -> list[nn.Parameter]:
        """What S2's matrix is made of. Methods define this."""
        raise NotImplementedError

    def factor(self) -> nn.Parameter | None:
        """This process's rows of a factor of S2 that every row of W needs whole."""
        return None

    def shared_parameters(self) -> list[nn.Parameter]:
        """Those that every process has whole, although it has only some rows of W."""
        return []

    def forward(self) -> Tensor:
        """W_hat [out, in], with gradients."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return fake_quant_weight(self.weight, self.log_step.exp(), self.zero_point, self.log_scale(), self.bits, self.dtype)

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, StepAndZeroPoint]:
        """The integers that :meth:`forward` computes with."""
        with torch.autocast(self.weight.device.type, enabled=False):
            step = self.log_step.exp()
            q = integers(self.weight, step, self.zero_point, self.log_scale(), self.bits)
        return q, StepAndZeroPoint(step, self.zero_point)

    def _zeros(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros((rows, columns), dtype=torch.float32, device=self.weight.device))


class FlexRoundScale(LearnedRounding):
    """S2 [out, in] and r [out, 1], both zero at the start."""

    def __init__(self, weight: Tensor, initial: StepAndZeroPoint, bits: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, initial, bits, dtype)
        self.matrix = self._zeros(*weight.shape)
        self.row = self._zeros(weight.shape[0], 1)

    def log_scale(self) -> LogScale:
        """S2 + r."""
        return LogScale(self.matrix, self.row)

    def matrix_parameters(self) -> list[nn.Parameter]:
        """S2 without r."""
        return [self.matrix]


class LrqScale(LearnedRounding):
    """S2 = L U + r + c: L, r and c zero at the start, U Kaiming-uniform with a = sqrt(5) unless it renews.

    weights: how many of one shape stand above each other in ``weight``, each with L, U, r and c of its own. renews: whether
    :meth:`renew` will be called. Then ``weight`` is a copy, W / exp(M), which is all that the arithmetic needs of W and M, in
    :func:`_renewable`'s dtype; and the rows of each U are others of one orthogonal matrix, until all were used, so that its
    factors together reach every input. fading: the share of M that each renewal takes away, as weight decay does of L and U.
    ranks: the processes that learn one W together; each has its rows of W, L and r, and its rows of U.
    """

    def __init__(
        self,
        weight: Tensor,
        initial: StepAndZeroPoint,
        bits: int,
        rank: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        *,
        weights: int = 1,
        renews: bool = False,
        fading: float = 0.0,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        super().__init__(_renewable(weight, initial) if renews else weight, initial, bits, dtype)
        self.renews = renews
        self._fading = fading
        self._unscaled = weight
        self.ranks = ranks
        self._weights = weights
        out_features, in_features = weight.shape
        self._complement = _Complement(in_features, weights)
        self.left = self._zeros(out_features, rank)
        self.right = nn.Parameter(self._first_right(generator))
        self.row = self._zeros(out_features, 1)
        self.column = self._zeros(weights, in_features)

    def log_scale(self) -> LogScale:
        """L U + r + c, relative to ``weight``."""
        right = self.whole_factor
        if right is None:
            right = self.ranks.all_rows(self.right.to(self.dtype))
        return LogScale(self._product(self.left.to(self.dtype), right), self.row, self.column)

    @torch.no_grad()
    def renew(self, generator: torch.Generator) -> None:
        """Add L U to M, let M fade, and begin with new factors: the rank of S2 can go on to grow."""
        assert self.renews
        scaled = self.weight * torch.exp(-self._product(self.left, self.ranks.all_rows(self.right)))
        # W / exp(M): its ratio to W says what M is, but for zeros.
        self.weight.copy_(scaled * torch.where(scaled == 0, 1.0, self._unscaled / scaled) ** self._fading)
        self.left.zero_()
        self.right.copy_(self._first_right(generator))

    def matrix_parameters(self) -> list[nn.Parameter]:
        """L and U."""
        return [self.left, self.right]

    def factor(self) -> nn.Parameter:
        """U."""
        return self.right

    def shared_parameters(self) -> list[nn.Parameter]:
        """c."""
        return [self.column]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """L U [out, in] from all rows of both."""
        if self._weights == 1:
            return left @ right
        return torch.bmm(*(factor.unflatten(0, (self._weights, -1)) for factor in (left, right))).flatten(0, 1)

    def _first_right(self, generator: torch.Generator) -> Tensor:
        """This process's rows of a new U. ``generator`` is on the CPU; on a GPU it gives the seed of a random U."""
        device = self.weight.device
        if self.renews:
            return self.ranks.own_rows(self._complement.rows(self.left.shape[1], generator, device))
        if device != generator.device:
            seed = torch.randint(2**62, (), generator=generator).item()
            generator = torch.Generator(device).manual_seed(int(seed))
        right = torch.empty((self._weights * self.left.shape[1], self.weight.shape[1]), device=device)
        return self.ranks.own_rows(nn.init.kaiming_uniform_(right, a=math.sqrt(5), generator=generator))


def _renewable(weight: Tensor, initial: StepAndZeroPoint) -> Tensor:
    """A copy of W that renewing factors changes again and again: float16 instead of bfloat16 if that keeps each value within
    2^-8 steps, else float32. bfloat16 moves values by up to 2^-6 steps each time, and back across what was learned.
    """
    fine = initial.step.min() >= 2**-17 and weight.abs().amax() < 2**15  # below 2^-14 float16 has units of 2^-24
    return weight.to(torch.float16 if fine else torch.float32) if weight.dtype == torch.bfloat16 else weight.clone()


class _Complement:
    """Rows [weights * rank, in] of random orthogonal matrices, as long as those of a Kaiming-uniform U: others each time, until
    all were used. The matrix is a cosine transform (DCT-II) whose rows come in random order and whose columns have random
    signs; weights differ in the signs.
    """

    def __init__(self, size: int, weights: int) -> None:
        self._size, self._weights = size, weights
        self._left = torch.empty(0, dtype=torch.int64)
        self._signs = torch.empty(0)

    def rows(self, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """The next ones, on ``device``. ``generator`` is on the CPU."""
        size = self._size
        if len(self._left) < rank:
            self._left = torch.randperm(size, generator=generator)
            self._signs = 2.0 * torch.randint(2, (self._weights, 1, size), generator=generator) - 1
        order, self._left = self._left[:rank, None].to(device), self._left[rank:]
        # Whole numbers, modulo a period: the angle is exact whatever the size.
        turns = order * (2 * torch.arange(size, device=device) + 1) % (4 * size)
        cosines = torch.cos(turns * (math.pi / (2 * size))) * torch.where(order == 0, 1.0, math.sqrt(2))
        return (cosines * math.sqrt(1 / (3 * size)) * self._signs.to(device)).flatten(0, 1)
