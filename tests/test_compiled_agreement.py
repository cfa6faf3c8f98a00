"""Schemes in vLLM's engine, compiled as vLLM does by default, against the reference path: several in one process."""

from pathlib import Path
from typing import Any

import pytest

from lrq_offline.agreement import reference_noise
from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_offline.source_model import load_tokenizer
from tests.checkpoints import HELDOUT, QUICK, SCHEMES, TINY, Checkpoints, write_random_model
from tests.served_agreement import ON_A_CPU, assert_as_the_reference_path, by_name
from tests.vllm_layers import EQUAL, SAME_SUMS

pytestmark = ON_A_CPU

PROMPTS, PROMPT_TOKENS = 8, 96  # as the bench takes them
# test_served.py serves w8a8. test_served_agreement.py serves w4a16 and w3a16, which are compiled to parts of what CORRECTED is.
LEARNED = [scheme for scheme in SCHEMES if scheme not in ("w8a8", "w4a16", "w3a16")]
CORRECTED, MAGNIFIED = "w4a16-rotated-corrected", "w4a4-rotated-corrected"
# vLLM runs OLMo 2 as transformers' own code, which it compiles in another order than its own (cpu_compilation.py).
OTHER_CODE = "olmo2"
EXPERTS = "mixtral"


@pytest.fixture(scope="module")
def served(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By scheme or family, a checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    source = write_random_model(OTHER_CODE, folder / "float")
    quantize_model(source, folder / OTHER_CODE, QuantizeSettings("w8a8", "smoothquant-rtn", **QUICK))
    for name, settings in (
        (MAGNIFIED, QuantizeSettings("w4a4", "gptq", correction_rank="10%", **QUICK)),
        (CORRECTED, QuantizeSettings("w4a16", "gptq", correction_rank="10%", rotate=True, **QUICK)),
    ):
        quantize_model(TINY, folder / name, settings)
    source = write_random_model(EXPERTS, folder / "float-experts")
    quantize_model(source, folder / EXPERTS, QuantizeSettings("w4a8", "rtn", **QUICK))
    made = {name: folder / name for name in (OTHER_CODE, EXPERTS, CORRECTED, MAGNIFIED)}
    return {scheme: checkpoints(scheme, "lrq") for scheme in LEARNED} | made


@pytest.fixture(scope="module")
def measured(served: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By scheme or family, what bench/served_agreement.py found."""
    return by_name(served, "compiled", tmp_path_factory.mktemp("agreement"))


@pytest.mark.parametrize("name", [*LEARNED, CORRECTED, OTHER_CODE, EXPERTS])
def test_schemes_compute_in_the_compiled_engine_as_the_reference_path_does(
    name: str, measured: dict[str, dict[str, Any]]
) -> None:
    assert_as_the_reference_path(measured[name])


def test_what_4_bit_activations_magnify_is_no_more_than_the_order_of_sums_makes(
    measured: dict[str, dict[str, Any]], served: dict[str, Path]
) -> None:
    """A correction hands on what attention rounds the other way, and 4-bit activations magnify it (docs/correction.md)."""
    row, folder = measured[MAGNIFIED], served[MAGNIFIED]
    prompts = token_windows(load_tokenizer(folder), read_texts(HELDOUT), PROMPTS, PROMPT_TOKENS)
    assert row["kernels"] != ["vLLM's own"]
    assert row["mean_difference"] <= 1.5 * reference_noise(folder, prompts)
    assert not SAME_SUMS or row["median_difference"] <= EQUAL
