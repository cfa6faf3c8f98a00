"""Which of the modules that vLLM fused into one layer a loader is called for."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["part_of"]

_QKV = {"q": 0, "k": 1, "v": 2}


def part_of(shard: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Its place among them, from what vLLM passes behind the parameter and the tensor: "q", "k", "v", a position, or nothing
    for a layer of one.
    """
    given: Any = shard[0] if shard else keywords.get("loaded_shard_id")
    return _QKV.get(given, given) or 0
