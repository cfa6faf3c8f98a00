"""The settings of one quantization run, checked when built: an invalid run cannot be constructed."""

from dataclasses import dataclass, replace

from lrq_vllm.checkpoint.schema import GROUP_UNIT, SCHEMES, Scheme, WeightFormat
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = [
    "DEVICES", "FULL_RANK", "HELD_OUT_SHARE", "INPUTS", "LOSSES", "METHODS", "PRESETS", "Preset", "QuantizeSettings",
    "default_method",
]  # fmt: skip

DEVICES = ("auto", "cpu", "cuda")
METHODS = ("lrq", "flexround", "gptq", "smoothquant-rtn", "rtn")
INPUTS = ("quantized", "float")
"""Of a block: what the quantized blocks before it put out, or the float model's."""
LOSSES = ("mse", "fisher")

FULL_RANK = "full"
HELD_OUT_SHARE = 16
"""One in so many windows is not learned from."""


def default_method(scheme: str) -> str:
    """The method where none is named: lrq, but gptq for clipped activations."""
    activation = SCHEMES[scheme].activation
    return "gptq" if activation is not None and activation.symmetric else "lrq"


@dataclass(frozen=True)
class Preset:
    """How long to learn, and on how much text."""

    iters: int
    samples: int
    seq_len: int
    batch_size: int = 2

    def with_given(self, **given: int | None) -> "Preset":
        """This preset with those values in place of its own that are not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


PRESETS = {
    "fast": Preset(iters=200, samples=64, seq_len=512),
    "default": Preset(iters=500, samples=64, seq_len=512),
    # LRQ, section 3 and appendix; needs a text of half a million tokens.
    "paper": Preset(iters=5000, samples=512, seq_len=1024),
}

# AdamW's learning rates and its decay of S2's matrix (L and U, or all of S2). The papers have no decay: their rates, 5e-4 to
# 9e-4 for LRQ at 4096, leave more error, and higher ones without decay fit the calibration text only (docs/quantize.md).
# LRQ's rate grows with sqrt(4096 / width): an element of L U is a sum of width / 4 terms, each as small as rate / decay in the
# end, so its noise stays the same. FlexRound (and LRQ at full rank): its authors' rate at every width.
_LRQ_RATE_AT_4096 = {8: 5e-4, 4: 2e-3, 3: 2e-3, 2: 2e-3}
_LRQ_DECAY = 2.0
# Share of what LRQ's earlier factors say that a renewal takes away, per unit of decay, which reaches the present factors only.
# KL on validation text is 0.5 to 4% lower so on foreign text, -2.1 to +1.6% elsewhere, and 1.6 to 6.3% lower everywhere after
# 2400 steps instead of 600 (bench/results/fading-small-h200.json).
_FADING = 0.01
_FLEXROUND_RATE = 3e-3
_FLEXROUND_DECAY = 1.0
# With a correction learning begins at GPTQ's integers, which the full rate leaves behind before it finds better ones: on
# tests/models/tiny (w4a4, rank 10%) the held-out error of a block then never came below its start.
_CORRECTED_SHARE = 0.25

_CHECKS = 10
# Steps that new factors need to be worth it: with 30 they gained, with fewer nothing has been tried. 8-bit weights lost by them
# (KL on tests/models/tiny 0.0108 without, 0.0111 with).
_LEAST_STEPS_OF_FACTORS = 30
# With a step for each group LRQ's KL on validation text is 0.5 to 3% lower so; FlexRound's is up to 7.5% higher, and with a
# step for each channel LRQ's is up to 1.5% higher (bench/results/step-rates-small-h200.json).
_GROUP_STEPS_SHARE = 0.1
_SEEDS = 2**40  # each block and window has one of its own, a million times as large, in 64 bits


@dataclass(frozen=True)
class QuantizeSettings:
    """Everything that decides the result of ``lrq-offline quantize``, apart from the model and the text.

    rank: of LRQ's matrix; None means a quarter of the model's width (LRQ, section 3), ``"full"`` a matrix of full rank.
    samples, seq_len: calibration windows and tokens per window. batch_size: windows per step.
    iters: most AdamW steps per block; ignored by methods that learn nothing. learning_rate: None means the default rate.
    weight_decay: of S2's matrix, per step and unit of learning rate; None means the default, 0 learns as the papers do.
    renew: whether LRQ's factors begin anew after each tenth of the steps, on top of what they learned (None: if it pays).
    loss: what learning lowers: ``"mse"``, the mean squared error of a block's output, or ``"fisher"``, that error weighed by
    how much it changes the model's predictions (output_metric.py); None: fisher below 8 bits without a correction.
    learn_inputs: whether blocks learn from the inputs that the quantized blocks produce, or from the float model's; None: float
    at 8 bits without a correction.
    kv_bits: 8 fake-quantizes keys and values per token and head while learning; None leaves them in 16 bits.
    correction_rank: of each layer's low-rank correction: a number, or like ``"10%"`` a share of the layer's smaller side.
    correction_statistics: whether it is found with the inputs that the quantized blocks produce, or with the float model's.
    correction_rounds: how often weight and correction are found in turn. rotate: QuaRot's rotations (None: for 4-bit
    activations). hadamard_block: how many inputs of down_proj are rotated together; None means all.
    Raises SettingsError with every problem found.
    """

    scheme: str
    method: str = "lrq"
    group_size: int | None = None
    symmetric: bool = False
    rank: int | str | None = None
    iters: int = PRESETS["default"].iters
    learning_rate: float | None = None
    weight_decay: float | None = None
    renew: bool | None = None
    loss: str | None = None
    learn_inputs: str | None = None
    samples: int = PRESETS["default"].samples
    seq_len: int = PRESETS["default"].seq_len
    batch_size: int = PRESETS["default"].batch_size
    kv_bits: int | None = None
    correction_rank: int | str | None = None
    correction_statistics: str = "quantized"
    correction_rounds: int = 1
    rotate: bool | None = None
    hadamard_block: int | None = None
    seed: int = 0
    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise SettingsError(f"Unknown scheme {self.scheme!r}. Choose one of {', '.join(SCHEMES)}.")
        if self.method not in METHODS:
            raise SettingsError(f"Unknown method {self.method!r}. Choose one of {', '.join(METHODS)}.")
        problems = [
            f"{name} is {value}, but must be at least {least}"
            for name, value, least in (
                ("iters", self.iters, 1),
                ("samples", self.samples, 1),
                ("seq-len", self.seq_len, 2),
                ("batch-size", self.batch_size, 1),
                ("rank", self.rank if isinstance(self.rank, int) else 1, 1),
                ("correction-rounds", self.correction_rounds, 1),
                ("seed", self.seed, 0),
            )
            if value < least
        ]
        if self.seed >= _SEEDS:
            problems.append(f"seed is {self.seed}, but must be below 2^40")
        if isinstance(self.rank, str) and self.rank != FULL_RANK:
            problems.append(f"rank is {self.rank!r}, but must be a number or {FULL_RANK}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            problems.append(f"lr is {self.learning_rate}, but must lie between 0 and 1")
        if self.weight_decay is not None and not 0 <= self.weight_decay < 100:
            problems.append(f"weight-decay is {self.weight_decay}, but must lie between 0 and 100")
        if self.loss is not None and self.loss not in LOSSES:
            problems.append(f"loss is {self.loss!r}, but must be {' or '.join(LOSSES)}")
        if self.learn_inputs is not None and self.learn_inputs not in INPUTS:
            problems.append(f"learn-inputs is {self.learn_inputs!r}, but must be {' or '.join(INPUTS)}")
        if self.kv_bits not in (None, 8):
            problems.append(f"kv-bits is {self.kv_bits}, but keys and values have 8 bits or stay as they are")
        problems += self._group_problems() + self._correction_problems() + self._rotation_problems()
        if problems:
            raise SettingsError("The settings do not fit: " + one_paragraph(problems, "Change these options."))

    def _group_problems(self) -> list[str]:
        size = self.group_size
        if size is None:
            return []
        if self.bits.weight_bits == 8:
            return [f"group-size goes with weights of 4 bits and fewer, not with {self.scheme} (one step per channel)"]
        if size <= 0 or size % GROUP_UNIT:
            return [f"group-size is {size}, but must be a multiple of {GROUP_UNIT}"]
        return []

    def _correction_problems(self) -> list[str]:
        problems = []
        if self.correction_statistics not in INPUTS:
            problems.append(f"correction-statistics is {self.correction_statistics!r}, but must be {' or '.join(INPUTS)}")
        if self.correction_rank is None:
            return problems
        try:
            least = self.correction_rank_of((1000, 1000))
        except (ValueError, OverflowError):
            least = 0
        if least < 1 or (isinstance(self.correction_rank, str) and least > 1000):
            problems.append(f"correction-rank is {self.correction_rank!r}, but must be a number from 1 up, or a share like 10%")
        return problems

    def _rotation_problems(self) -> list[str]:
        problems = []
        if self.rotates and self.smooths:
            problems.append(
                "rotate does not go with SmoothQuant, whose scales a rotation would mix; leave it out, or choose method rtn"
            )
        if self.hadamard_block is not None and not self.rotates:
            problems.append("hadamard-block is for rotated models; pass rotate too")
        elif self.hadamard_block is not None and self.hadamard_block < 2:
            problems.append(f"hadamard-block is {self.hadamard_block}, but must be at least 2")
        return problems

    @property
    def bits(self) -> Scheme:
        """Bit widths of the scheme."""
        return SCHEMES[self.scheme]

    @property
    def weight_format(self) -> WeightFormat:
        """How the weights will be stored."""
        return WeightFormat(self.bits.weight_bits, self.symmetric, self.group_size)

    @property
    def smooths(self) -> bool:
        """Whether SmoothQuant comes first: where activations are static, unless the method is plain rounding."""
        static = self.bits.activation is not None and self.bits.activation.static
        return self.method == "smoothquant-rtn" or (static and self.method != "rtn")

    @property
    def _clips(self) -> bool:
        return self.bits.activation is not None and self.bits.activation.symmetric

    @property
    def rotates(self) -> bool:
        """Whether QuaRot's rotations come first."""
        return self._clips and not self.smooths if self.rotate is None else self.rotate

    @property
    def corrects(self) -> bool:
        """Whether layers get a low-rank correction."""
        return self.correction_rank is not None

    @property
    def corrects_from_float(self) -> bool:
        """Whether corrections are found with the float model's inputs."""
        return self.corrects and self.correction_statistics == "float"

    @property
    def changes_weights(self) -> bool:
        """Whether the weights that are quantized are not those that the source holds."""
        return self.smooths or self.rotates

    @property
    def caches(self) -> int:
        """How many caches of hidden states a run keeps: of both models, and the float model's of the block before."""
        return 3 if self.learns_from_float or self.corrects_from_float else 2

    def correction_rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank of the correction of a weight of this shape. Only where there is one."""
        rank = self.correction_rank
        assert rank is not None
        if isinstance(rank, int):
            return rank
        share = float(rank.removesuffix("%")) / 100
        return max(round(share * min(shape)), 1) if 0 < share else 0

    @property
    def learns(self) -> bool:
        """Whether the method learns by gradient descent."""
        return self.method in ("lrq", "flexround")

    @property
    def weighs_errors(self) -> bool:
        """Whether learning weighs a block's errors by what they do to the model's predictions."""
        # With 8 bits it gains nothing (bench/results/quality-small-h200.json); with corrections it has not been measured.
        pays = self.bits.weight_bits < 8 and not self.corrects
        return self.learns and (pays if self.loss is None else self.loss == "fisher")

    @property
    def decided_loss(self) -> str:
        """``loss`` where it was given, else the default; ``mse`` for a method that learns nothing."""
        return "fisher" if self.weighs_errors else "mse"

    @property
    def learns_from_float(self) -> bool:
        """Whether blocks learn from the float model's inputs."""
        # Blocks of 8 bits have little to make up for, and what they learn of it does not hold on other text
        # (bench/results/learn-inputs-small-h200.json); with corrections it has not been measured.
        pays = self.bits.weight_bits == 8 and not self.corrects
        return self.learns and (pays if self.learn_inputs is None else self.learn_inputs == "float")

    @property
    def check_every(self) -> int:
        """Steps between two looks at the held-out windows."""
        return max(self.iters // _CHECKS, 1)

    @property
    def renews(self) -> bool:
        """Whether LRQ's factors begin anew after each look (learned_scales.py)."""
        pays = self.check_every >= _LEAST_STEPS_OF_FACTORS and self.bits.weight_bits < 8
        return (pays if self.renew is None else self.renew) and self.learns and not self.full_matrix

    @property
    def full_matrix(self) -> bool:
        """Whether S2's matrix is learned element by element, as FlexRound does, not as a product."""
        return self.method == "flexround" or self.rank == FULL_RANK

    def matrix_rank(self, width: int) -> int | None:
        """The rank of S2's matrix for a model ``width`` wide; None means a full matrix."""
        if self.full_matrix:
            return None
        return max(width // 4, 1) if self.rank is None else int(self.rank)

    def rate(self, width: int) -> float:
        """AdamW's first learning rate for a model ``width`` wide; 0 for a method that learns nothing."""
        if not self.learns:
            return 0.0
        if self.learning_rate is not None:
            return self.learning_rate
        share = _CORRECTED_SHARE if self.corrects else 1.0
        if self.full_matrix:
            return share * _FLEXROUND_RATE
        return share * _LRQ_RATE_AT_4096[self.bits.weight_bits] * (4096 / width) ** 0.5

    @property
    def step_rate_share(self) -> float:
        """What share of that rate the steps of weights are learned at."""
        return _GROUP_STEPS_SHARE if self.group_size is not None and not self.full_matrix else 1.0

    @property
    def decay(self) -> float:
        """AdamW's weight decay of S2's matrix; 0 for a method that learns nothing."""
        if not self.learns:
            return 0.0
        if self.weight_decay is not None:
            return self.weight_decay
        return _FLEXROUND_DECAY if self.full_matrix else _LRQ_DECAY

    @property
    def fading(self) -> float:
        """What share of what LRQ's earlier factors say each renewal takes away."""
        return _FADING * self.decay
