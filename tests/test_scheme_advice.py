"""What is said against a scheme: with the numbers that were measured, once, and only where they hold."""

import json
from pathlib import Path

import pytest

from lrq_offline.cli import main
from lrq_offline.config import QuantizeSettings
from lrq_offline.scheme_advice import W4A4_MEASURED, scheme_warnings
from lrq_vllm.checkpoint.report import REPORT_NAME
from lrq_vllm.checkpoint.schema import SCHEMES
from tests.checkpoints import QUICK, TINY

RESULTS = Path(__file__).parent.parent / "bench" / "results"


def test_the_numbers_are_those_of_the_measurements() -> None:
    rows = {row["cell"]: row for row in json.loads((RESULTS / "correction-small.json").read_text())["rows"]}
    for name, cell in (("w4a4", "w4a4:gptq"), ("w4a4 10%", "w4a4:gptq:10%"), ("w4a8", "w4a8:gptq")):
        assert W4A4_MEASURED[name].kl == pytest.approx(rows[cell]["texts"]["docs"]["kl"], abs=5e-5)
        assert W4A4_MEASURED[name].linear_bytes == rows[cell]["bytes"]
    times = {
        row["share"]: row
        for row in json.loads((RESULTS / "correction-speed-h200.json").read_text())["rows"]
        if (row["shape"], row["tokens"]) == ("gate_up", 256)
    }
    for name, measured in (("w4a4", times[0.0]["us"]), ("w4a4 10%", times[0.1]["us"]), ("w4a8", times[0.0]["w4a8_us"])):
        assert W4A4_MEASURED[name].gate_up_us == pytest.approx(measured, abs=0.05)


@pytest.mark.parametrize("options", [[], ["--correction-rank", "4"]], ids=["plain", "corrected"])
def test_w4a4_is_told_once_that_w4a8_is_better_and_as_fast(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [word for name in ("samples", "seq_len") for word in (f"--{name.replace('_', '-')}", str(QUICK[name]))]
    output = str(tmp_path / "out")
    assert main(["quantize", str(TINY), "--scheme", "w4a4", "--method", "rtn", *lengths, *options, "-o", output]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    (warning,) = json.loads((tmp_path / "out" / REPORT_NAME).read_text())["warnings"]
    assert said.count(f"warning: {warning}") == said.count("w4a8") == 1
    assert "0.065" in warning and "0.187" in warning and "0.109 in 1.58 times as many" in warning and "51, 51 and 68" in warning
    assert warning.endswith(".") and ". " not in warning
    assert main(["report", output]) == 0
    assert (tmp_path / "out" / "lrq_report.html").read_text().count("w4a8 without a correction is better") == 1


def test_no_other_scheme_is_warned_of() -> None:
    for scheme in SCHEMES:
        method = "gptq" if scheme == "w4a4" else "rtn"
        assert len(scheme_warnings(QuantizeSettings(scheme, method))) == (scheme in ("w4a4", "w2a16"))


@pytest.mark.parametrize(
    ("scheme", "group", "unit"),
    [("w4a8", 64, 128), ("w4a16", 32, 64), ("w4a8", 128, None), ("w4a16", 64, None), ("w4a8", None, None)],
)
def test_groups_that_only_a_slow_kernel_takes_are_warned_of(scheme: str, group: int | None, unit: int | None) -> None:
    warnings = scheme_warnings(QuantizeSettings(scheme, "rtn", group_size=group))
    assert len(warnings) == (unit is not None)
    for warning in warnings:
        assert f"groups of {group} inputs {scheme} " in warning and f"a multiple of {unit} " in warning


def test_2_bit_weights_are_warned_of() -> None:
    (warning,) = scheme_warnings(QuantizeSettings("w2a16", "rtn"))
    assert "w2a16 is multiplied by a simple Triton kernel" in warning and "w3a16" in warning
