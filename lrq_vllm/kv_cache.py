"""Keys and values in 8 bits: which of vLLM's caches serves a checkpoint that asks for them, and which must not be used.

No vLLM has a hook by which a quantization config chooses the cache: ``lrq-server serve`` does, by --kv-cache-dtype.
"""

import logging
from functools import cache

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import SettingsError

__all__ = ["CACHE_OPTION", "cache_dtype", "check_cache_dtype", "in_16_bits"]

logger = logging.getLogger(f"vllm.{__name__}")

CACHE_OPTION = "--kv-cache-dtype"
_PER_TOKEN_HEAD = "per_token_head"


def cache_dtype(*, on_cpu: bool) -> str:
    """What CACHE_OPTION takes for 8 bits: int8 with a step for each token and head on a GPU, and fp8 on a CPU, where vLLM has
    nothing else.
    """
    return "fp8" if on_cpu else f"int8_{_PER_TOKEN_HEAD}"


def in_16_bits(dtype: str) -> bool:
    """Whether a cache of this dtype, as vLLM calls it, keeps keys and values as the model computes them."""
    return dtype in ("auto", "bfloat16", "float16")


def check_cache_dtype(dtype: str, manifest: Manifest, *, on_cpu: bool) -> None:
    """Warn, once, if a checkpoint that asks for 8 bits gets 16. dtype: vLLM's name of the cache's.

    Raises SettingsError for a cache per token and head on a CPU: vLLM accepts it there and reads it as fp8.
    """
    if on_cpu and dtype.endswith(_PER_TOKEN_HEAD):
        raise SettingsError(
            f"{CACHE_OPTION} {dtype} gives wrong results on a CPU: vLLM's attention reads such a cache as fp8. "
            f"Serve with {CACHE_OPTION} {cache_dtype(on_cpu=True)}, or without the option."
        )
    if manifest.kv_bits is not None and in_16_bits(dtype):
        _warn_of_16_bits(cache_dtype(on_cpu=on_cpu))


@cache
def _warn_of_16_bits(dtype: str) -> None:
    logger.warning(
        "This checkpoint was made for 8-bit keys and values, but they are cached in 16 bits. Serve it with %s %s, or by "
        "`lrq-server serve`, which adds that.", CACHE_OPTION, dtype,
    )  # fmt: skip
