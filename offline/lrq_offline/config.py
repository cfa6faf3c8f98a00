"""The settings of one quantization run, checked when built: an invalid run cannot be constructed."""

from dataclasses import dataclass
from pathlib import Path

from lrq_vllm.checkpoint.schema import GROUP_UNIT, SCHEMES, Scheme, WeightFormat
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["METHODS", "QuantizeSettings", "default_learning_rate"]

METHODS = ("lrq", "flexround", "rtn")

# Adam's learning rates. LRQ: those of the paper's authors for 4096-wide models (their scripts; 8-bit weights: as w4a8),
# scaled by sqrt(4096 / width) because k terms of L U with U ~ 1/sqrt(width) move an element by about k / sqrt(width)
# times the rate, and k is width / 4. FlexRound: theirs for W4A16, at every width.
_LRQ_RATE_AT_4096 = {"w8a8": 5e-4, "w4a8": 5e-4, "w4a16": 9e-4, "w3a16": 6e-4}
_FLEXROUND_RATE = 3e-3


def default_learning_rate(method: str, scheme: str, width: int) -> float:
    """The rate for a model ``width`` wide; 0 for a method that learns nothing."""
    match method:
        case "lrq":
            return _LRQ_RATE_AT_4096[scheme] * (4096 / width) ** 0.5
        case "flexround":
            return _FLEXROUND_RATE
        case _:
            return 0.0


@dataclass(frozen=True)
class QuantizeSettings:
    """Everything that decides the result of ``lrq-offline quantize``, apart from the model and the text.

    rank: of LRQ's matrix; None means a quarter of the model's width (LRQ, section 3).
    samples, seq_len: calibration windows and tokens per window. batch_size: windows per step.
    iters: Adam steps per block; ignored by rtn. learning_rate: None means
    :func:`default_learning_rate`.
    Raises SettingsError with every problem found.
    """

    scheme: str
    method: str = "lrq"
    group_size: int | None = None
    symmetric: bool = False
    rank: int | None = None
    iters: int = 200
    learning_rate: float | None = None
    samples: int = 64
    seq_len: int = 512
    batch_size: int = 2
    seed: int = 0
    calibration: Path | None = None

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
                ("rank", 1 if self.rank is None else self.rank, 1),
                ("seed", self.seed, 0),
            )
            if value < least
        ]
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            problems.append(f"lr is {self.learning_rate}, but must lie between 0 and 1")
        problems += self._group_problems()
        if problems:
            raise SettingsError("The settings do not fit: " + one_paragraph(problems, "Change these options."))

    def _group_problems(self) -> list[str]:
        size = self.group_size
        if size is None:
            return []
        if self.bits.activation is not None:
            return [f"group-size is only served for 16-bit activations, not for {self.scheme} (one step per channel)"]
        if size <= 0 or size % GROUP_UNIT:
            return [f"group-size is {size}, but must be a multiple of {GROUP_UNIT}"]
        return []

    @property
    def bits(self) -> Scheme:
        """Bit widths of the scheme."""
        return SCHEMES[self.scheme]

    @property
    def weight_format(self) -> WeightFormat:
        """How the weights will be stored."""
        return WeightFormat(self.bits.weight_bits, self.symmetric, self.group_size)
