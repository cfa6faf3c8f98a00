"""The HTML report of a quantization: complete, escaped, self-contained, the same every time."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lrq_offline.report_html import write_report
from lrq_offline.report_pictures import amount, scientific
from lrq_vllm.checkpoint.report import read_report
from lrq_vllm.errors import CheckpointError, SettingsError
from tests.html_pages import Page, loads_nothing

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def a_report(blocks: int = 2, method: str = "lrq") -> dict[str, Any]:
    """What lrq_report.json holds after a run; the errors are random and nothing of a run by rtn is learned."""
    chance, gain = random.Random(0), 1.0 if method == "rtn" else 0.5

    def result() -> dict[str, float]:
        before = 10 ** chance.uniform(-4, -2)
        return {"error_before": before, "error_after": before * gain}

    curve = {"step": [0, 60, 120], "train": [None, 1.2e-3, 9e-4], "held_out": [1.5e-3, 1.1e-3, 9.5e-4]}
    return {
        "tool_version": "0.1.0",
        "model": "small",
        "settings": {"scheme": "w4a16", "method": method, "iters": 120, "rank": None, "calibration": "calibration.jsonl"},
        "quantized_linears": {"modules": blocks * len(LAYERS), "float_bytes": 8_000_000, "bytes": 2_064_000, "ratio": 0.258},
        "checkpoint_bytes": 3_064_000,
        "source_bytes": 9_000_000,
        "warnings": [],
        "blocks": [
            {
                "block": index + 1,
                "blocks": blocks,
                **result(),
                "seconds": 12.3,
                "steps": 0 if method == "rtn" else 120,
                "curve": {name: [] for name in curve} if method == "rtn" else dict(curve),
                "layers": {name: {**result(), "fallback": None} for name in LAYERS},
            }
            for index in range(blocks)
        ],
        "seconds": 123.4,
    }


def written(folder: Path, report: dict[str, Any]) -> str:
    """The page for a report."""
    (folder / "lrq_report.json").write_text(json.dumps(report))
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run of 13 blocks, the least number that is drawn with all curves in one picture."""
    return written(tmp_path_factory.mktemp("report"), a_report(13))


@pytest.mark.parametrize("blocks", [1, 12, 33])
def test_every_block_and_every_layer_appears_in_tables_and_pictures(tmp_path: Path, blocks: int) -> None:
    report = a_report(blocks)
    page = Page(written(tmp_path, report))
    assert page.open == []
    for block in report["blocks"]:
        assert scientific(block["error_before"]) in page.text and scientific(block["error_after"]) in page.text
        assert all(scientific(layer["error_after"]) in page.text for layer in block["layers"].values())
    # A heading of the table, and a row of the two maps in each of two widths.
    assert all(page.text.count(name) >= 5 for name in LAYERS)
    pictures = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "svg"]
    assert sum("urve" in name or "loss" in name for name in pictures) == (blocks if blocks <= 12 else 2)


def test_headline_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    text = Page(written(tmp_path, a_report())).text
    for number in ("3.06 MB", "34.0% of 9.00 MB", "25.8%", "2.1 min", "w4a16", "lrq 0.1.0", "\N{MINUS SIGN}50%"):
        assert number in text


def test_the_page_says_in_which_measure_errors_are_and_what_was_held_out(tmp_path: Path) -> None:
    report = a_report()
    for loss, samples in (("mse", 128), ("fisher", 8)):
        report["settings"] |= {"loss": loss, "samples": samples}
        text = Page(written(tmp_path, report)).text
        assert ("do not compare with those of another loss" in text) == (loss == "fisher")
        assert "with everything before it quantized too" in text
        assert ("none is held out of fewer than 16 windows" in text) == (samples < 16)
    report["settings"]["learn_inputs"] = "float"
    assert "with everything before it as in the float model" in Page(written(tmp_path, report)).text


def test_layers_that_fell_back_are_listed_with_their_reason(tmp_path: Path) -> None:
    report = a_report()
    assert "No warnings" in written(tmp_path, report)
    report["warnings"] = ["Only 3 windows could be filled."]
    for block in report["blocks"]:
        block["layers"]["mlp.down_proj"]["fallback"] = "learning raised the held-out error"
    text = Page(written(tmp_path, report)).text
    assert "No warnings" not in text and "Only 3 windows could be filled." in text
    assert "2 layers only rounded to nearest: learning raised the held-out error." in text
    assert "mlp.down_proj in block 1, 2" in text


EVIL = """<script>alert('x')</script> "onload="x" & ${model} $\\frac{1}{2}$"""


def test_nothing_in_a_report_becomes_markup(tmp_path: Path) -> None:
    report = a_report()
    report["model"] = report["tool_version"] = EVIL
    report["settings"].update(scheme=EVIL, method=EVIL, calibration=EVIL)
    report["warnings"] = [EVIL]
    layers = report["blocks"][0]["layers"]
    layers[EVIL] = {**layers.pop("mlp.down_proj"), "fallback": EVIL}
    page = Page(written(tmp_path, report))
    assert page.open == [] and EVIL in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_text_that_utf8_cannot_hold_is_no_reason_to_fail(tmp_path: Path) -> None:
    report = a_report()
    report["model"] = "bad\udcffname"  # as a file name with a stray byte comes out of os.listdir
    assert "<h1>bad?name</h1>" in written(tmp_path, report)


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    assert loads_nothing(page)


def test_what_pictures_refer_to_is_defined_once(page: str) -> None:
    defined = [str(attributes["id"]) for _, attributes in Page(page).tags if "id" in attributes]
    assert len(defined) == len(set(defined))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(defined)


def test_pictures_take_every_colour_from_the_style_sheet(page: str) -> None:
    pictures = "".join(re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall("#[0-9a-f]{6}", pictures)
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--colour"} <= set(re.findall(r"(--[\w-]+):", page))


def test_a_run_that_learned_nothing_has_no_curves_and_no_change(tmp_path: Path) -> None:
    text = Page(written(tmp_path, a_report(method="rtn"))).text
    assert "Learning curves" not in text and "Change by learning" not in text and "after learning" not in text
    assert all(name in text for name in LAYERS)


@pytest.mark.parametrize(
    ("method", "correction", "said"),
    [("rtn", None, "rounded to nearest"), ("gptq", None, "rounded by GPTQ"), ("gptq", "10%", "rounded by GPTQ, and corrected")],
)
def test_a_run_that_learned_nothing_says_how_it_rounded(tmp_path: Path, method: str, correction: str | None, said: str) -> None:
    report = a_report(method="rtn")
    report["settings"] |= {"method": method, "correction_rank": correction}
    for block in report["blocks"]:
        for layer in block["layers"].values():
            layer["error_before"] = layer["error_after"] * (1 if method == "rtn" else 2)
    text = Page(written(tmp_path, report)).text
    assert said in text and "Learning lowers" not in text and "Change by learning" not in text
    assert ("Change against rounding to nearest" in text) == (method == "gptq")


def test_errors_without_a_logarithm_are_told_and_not_drawn(tmp_path: Path) -> None:
    report = a_report()
    for block, error, of_layers in zip(report["blocks"], (0.0, math.nan), (0.0, math.inf), strict=True):
        block["error_after"] = error
        block["curve"]["held_out"] = [error, None, math.inf]
        for layer in block["layers"].values():
            layer["error_after"] = layer["error_before"] = of_layers
    text = Page(written(tmp_path, report)).text
    assert "nan" in text and "inf" in text


def test_a_block_may_lack_a_layer_that_others_have(tmp_path: Path) -> None:
    report = a_report()
    del report["blocks"][1]["layers"]["mlp.gate_proj"]
    assert "mlp.gate_proj" in written(tmp_path, report)


def test_the_same_report_gives_the_same_bytes(tmp_path: Path, page: str) -> None:
    assert written(tmp_path, a_report(13)) == page


def test_the_report_goes_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "lrq_report.json").write_text(json.dumps(a_report(1)))
    output = tmp_path / "elsewhere.html"
    assert write_report(tmp_path, output) == output
    assert {path.name for path in tmp_path.iterdir()} == {"lrq_report.json", "elsewhere.html"}


@pytest.mark.parametrize("place", [".", "absent/report.html"])
def test_a_place_that_no_file_can_be_at_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "lrq_report.json").write_text(json.dumps(a_report(1)))
    with pytest.raises(SettingsError, match="a folder or lies in none"):
        write_report(tmp_path, tmp_path / place)


def test_a_failed_write_leaves_the_old_report_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = written(tmp_path, a_report(1, "rtn"))

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        written(tmp_path, a_report(1))
    assert (tmp_path / "lrq_report.html").read_text(encoding="utf-8") == old
    assert {path.name for path in tmp_path.iterdir()} == {"lrq_report.json", "lrq_report.html"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("model",), "model is missing"),
        (("source_bytes",), "source_bytes is missing"),
        (("quantized_linears", "bytes"), "quantized_linears.bytes is missing"),
        (("settings", "scheme"), "settings.scheme is missing"),
        (("blocks", 1, "curve"), "blocks[1].curve is missing"),
        (("blocks", 0, "layers", "mlp.down_proj", "fallback"), "blocks[0].layers.mlp.down_proj.fallback is missing"),
    ],
)
def test_a_report_of_an_older_version_is_refused_by_name(tmp_path: Path, path: tuple[Any, ...], said: str) -> None:
    report = a_report()
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(CheckpointError) as refused:
        written(tmp_path, report)
    assert said in str(refused.value) and str(tmp_path / "lrq_report.json") in str(refused.value)
    assert "Quantize again with this version" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": "long"}, "seconds is 'long'"),
        ({"warnings": None}, "warnings is no list"),
        ({"blocks": []}, "blocks does not hold block 1"),
        ({"source_bytes": 10}, "source_bytes is 10"),
    ],
)
def test_a_report_that_cannot_be_true_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(said)):
        written(tmp_path, a_report() | change)


def test_curves_of_unequal_lengths_are_refused(tmp_path: Path) -> None:
    report = a_report()
    report["blocks"][1]["curve"] = {"step": [0, 60], "train": [None], "held_out": [1.0, 2.0]}
    with pytest.raises(CheckpointError, match="curves of block 2"):
        written(tmp_path, report)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no lrq_report\.json"):
        read_report(tmp_path)
    (tmp_path / "lrq_report.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_340, "12.3 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (16_060_000_000, "16.1 GB"), (2_500_000_000_000, "2.50 TB")],
)  # fmt: skip
def test_sizes_are_shown_with_three_figures(size_bytes: int, shown: str) -> None:
    assert amount(size_bytes) == shown


def test_numbers_are_shown_in_powers_of_ten() -> None:
    assert [scientific(value) for value in (1.234e-3, 12.0, 0.0)] == [
        "1.23\N{MULTIPLICATION SIGN}10⁻³", "1.20\N{MULTIPLICATION SIGN}10¹", "0",
    ]  # fmt: skip
