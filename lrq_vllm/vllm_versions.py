"""Which versions of vLLM the plugin works with."""

from lrq_vllm.errors import SettingsError

__all__ = ["SUPPORTED", "check_version", "supports"]

_OLDEST, _NEWEST = (0, 25), (0, 33)
SUPPORTED = "0.25 to 0.33"


def supports(version: str) -> bool:
    """Whether the plugin works with a vLLM of this ``__version__``. Builds of a source tree have none: they may try."""
    numbers = version.split(".")[:2]
    if "dev" in version or not all(number.isdigit() for number in numbers):
        return True
    return _OLDEST <= tuple(map(int, numbers)) <= _NEWEST


def check_version(version: str) -> None:
    """Raises SettingsError, which says what works, for another version."""
    if not supports(version):
        raise SettingsError(
            f"lrq serves with vLLM {SUPPORTED}; this is {version}, whose layers it does not know. Install one of those beside "
            "lrq: pip install 'vllm>=0.25,<0.34'. Models that lrq did not quantize are not affected."
        )
