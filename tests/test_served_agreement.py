"""Families and schemes in vLLM's engine, not compiled, against the reference path: several in one process."""

from pathlib import Path
from typing import Any

import pytest

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from tests.checkpoints import FAMILIES, QUICK, TINY, Checkpoints, write_random_model
from tests.served_agreement import ON_A_CPU, assert_as_the_reference_path, by_name

pytestmark = ON_A_CPU

# vLLM runs OLMo 2 as transformers' own code: test_compiled_agreement.py has it.
EAGER = [family for family in FAMILIES if family != "olmo2"]
LEARNED = ("w4a16", "w3a16")
SCHEMES = {
    "w4a8-groups": QuantizeSettings("w4a8", "rtn", group_size=64, **QUICK),
    "w4a4-rotated": QuantizeSettings("w4a4", "gptq", **QUICK),
}


@pytest.fixture(scope="module")
def measured(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By family of a random model, or by scheme of the tiny model, what bench/served_agreement.py found."""
    folder = tmp_path_factory.mktemp("agreement")
    served: dict[str, Path] = {scheme: checkpoints(scheme, "lrq") for scheme in LEARNED}
    for family in EAGER:
        source = write_random_model(family, folder / f"{family}-float")
        served[family] = folder / family
        quantize_model(source, served[family], QuantizeSettings("w8a8", "smoothquant-rtn", **QUICK))
    for name, settings in SCHEMES.items():
        served[name] = folder / name
        quantize_model(TINY, served[name], settings)
    return by_name(served, "eager", folder)


@pytest.mark.parametrize("name", [*EAGER, *LEARNED, *SCHEMES])
def test_families_and_schemes_compute_in_the_engine_as_the_reference_path_does(
    name: str, measured: dict[str, dict[str, Any]]
) -> None:
    assert_as_the_reference_path(measured[name])
