"""What ``lrq-server bench`` asks of a server, at every concurrency alike."""

import re
from dataclasses import dataclass
from pathlib import Path

from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["RANDOM", "SHARED_PREFIX", "BenchSettings", "parse_floor"]

RANDOM, SHARED_PREFIX = "random", "shared-prefix"
_LEAST_REQUESTS, _REQUESTS_IN_TURN = 32, 8
_SEEDS = 2**31  # with those of the levels still within NumPy's 32 bits


@dataclass(frozen=True)
class BenchSettings:
    """The load: so many requests at a time, each of ``input_tokens`` and answered with ``output_tokens``.

    concurrency: ascending, each once. requests_per_level: None for 8 in turn on each of the concurrent places, at least 32.
    prompts: RANDOM tokens; SHARED_PREFIX, random with the first three quarters the same in all; or a file of prompts, whose
    lengths count then and not ``input_tokens``.

    Raises SettingsError, naming everything that cannot be.
    """

    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    input_tokens: int = 512
    output_tokens: int = 128
    requests_per_level: int | None = None
    prompts: str | Path = RANDOM
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.concurrency or min(self.concurrency) < 1:
            problems.append("--concurrency must be 1 or more")
        if list(self.concurrency) != sorted(set(self.concurrency)):
            problems.append(f"--concurrency {' '.join(map(str, self.concurrency))} must ascend and name each number once")
        if self.input_tokens < 2:
            problems.append(f"--input-tokens {self.input_tokens} must be 2 or more")
        if self.output_tokens < 2:
            problems.append(f"--output-tokens {self.output_tokens} must be 2 or more: one token has no time after it")
        if self.requests_per_level is not None and self.concurrency and self.requests_per_level < max(self.concurrency):
            problems.append(f"{self.requests_per_level} requests are not enough for {max(self.concurrency)} at a time")
        if not 0 <= self.seed < _SEEDS:
            problems.append(f"--seed {self.seed} must be at least 0 and below {_SEEDS}")
        if problems:
            raise SettingsError(one_paragraph(problems, "See `lrq-server bench --help`."))

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer, as far as it is known: the length of a file's prompts is not."""
        return self.output_tokens + (self.input_tokens if isinstance(self.prompts, str) else 0)

    def requests(self, concurrency: int) -> int:
        """How many are measured at this concurrency."""
        return self.requests_per_level or max(_LEAST_REQUESTS, _REQUESTS_IN_TURN * concurrency)

    def level_seed(self, concurrency: int) -> int:
        """Another one for each concurrency: a server's prefix cache must not know the prompts of the level before."""
        return self.seed + self.concurrency.index(concurrency)


def parse_floor(text: str) -> float:
    """``1.3x`` or ``1.3`` as 1.3. Raises SettingsError for what is not a ratio above 0."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)x?", text)
    if number is None or float(number[1]) == 0:
        raise SettingsError(f"--floor {text} is not a ratio of tokens/s. Write it like 1.3x.")
    return float(number[1])
