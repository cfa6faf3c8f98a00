"""Which of the modules that vLLM fused into one layer, or one stack of experts' layers, a loader is called for."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["part_of"]

_QKV = {"q": 0, "k": 1, "v": 2}
_OF_EXPERT = {"w1": 0, "w3": 1, "w2": 0}


def part_of(shard: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Its place among them, from what vLLM passes behind the parameter and the tensor: "q", "k", "v", a position, or nothing
    for a layer of one. For an expert's: its place in the whole stack.
    """
    if "expert_id" in keywords:
        return 2 * int(keywords["expert_id"]) + _OF_EXPERT[keywords["shard_id"]]
    given: Any = shard[0] if shard else keywords.get("loaded_shard_id")
    return _QKV.get(given, given) or 0
