"""The low-rank correction of a quantized layer, in 16 bits (LRC, arXiv 2412.07902): y = W_hat Q(x) + U (V^T x).

U [out, k] and V [in, k]. A layer has them or has not, and each may have another k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["LOW_RANK_SUFFIXES", "Correction"]

LOW_RANK_SUFFIXES = ("low_rank_u", "low_rank_v")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Correction:
    """dtype: of U and V, a 16-bit one. rank: module -> k, for the modules that are corrected."""

    dtype: torch.dtype
    rank: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The object under ``correction`` in config.json."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "rank": dict(self.rank)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Correction":
        """Raises KeyError or ValueError for one of another form; :meth:`problems` says what else can be wrong."""
        return cls(_DTYPES[config["dtype"]], MappingProxyType({name: int(k) for name, k in config["rank"].items()}))

    def renamed(self, new_name: Callable[[str], str]) -> "Correction":
        """The same, of modules that have other names."""
        return Correction(self.dtype, {new_name(name): k for name, k in self.rank.items()})

    def problems(self, quantized: Mapping[str, tuple[int, int]]) -> list[str]:
        """What is wrong with it in a checkpoint of these modules, name -> (out, in)."""
        problems = [] if self.rank else ["correction lists no module"]
        for name, k in self.rank.items():
            if name not in quantized:
                problems.append(f"correction lists {name}, which is not quantized")
            elif not 1 <= k <= min(quantized[name]):
                problems.append(f"correction has rank {k} for {name}, whose ranks are 1 to {min(quantized[name])}")
        return problems
