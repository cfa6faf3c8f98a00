"""Where and with what a result was measured."""

import datetime
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

__all__ = ["lrq_variables", "measured_on", "memory_tb_per_s", "version_of"]

_MEMORY_TB_PER_S = {"NVIDIA H100 80GB HBM3": 3.0, "NVIDIA H200": 4.3}  # a copy's bytes read and written


def measured_on(*packages: str) -> dict[str, Any]:
    """What a result's file begins with: today, the GPU or else the CPU, and the packages' versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.cpu.get_capabilities()["cpu_name"]
    versions = {name: version_of(name) for name in packages}
    return {"date": datetime.date.today().isoformat(), "device": device, "versions": versions}


def lrq_variables() -> dict[str, str]:
    """What of the environment changes how lrq serves."""
    return {name: value for name, value in os.environ.items() if name.startswith("LRQ_")}


def version_of(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_tb_per_s() -> float:
    """Of this GPU, from which floors are counted; ends the program if it is not known."""
    name = torch.cuda.get_device_name()
    if name not in _MEMORY_TB_PER_S:
        sys.exit(f"Add the memory speed of {name} to bench/measured_on.py: floors are counted from it.")
    return _MEMORY_TB_PER_S[name]
