"""The page of a bench: complete, escaped, self-contained, and drawn by a browser."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import image

from lrq_server.bench_page import write_html
from lrq_server.bench_result import BenchResult
from tests.benches import a_result
from tests.html_pages import Page, loads_nothing

EVIL = """<script>alert('x')</script> "onload="x" & ${model} $\\frac{1}{2}$"""
_CHARTS = 6  # throughput, trade-off, four latencies
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Colours of the two series on the light page, as red, green and blue.
_SERIES = ((0x24, 0x63, 0xC4), (0x98, 0xA1, 0xAC))


def written(folder: Path, result: BenchResult) -> str:
    write_html(result, folder / "bench.html")
    return (folder / "bench.html").read_text(encoding="utf-8")


def test_every_level_of_every_server_is_in_the_tables(tmp_path: Path) -> None:
    text = Page(written(tmp_path, a_result((1, 4, 16), faster=1.25))).text
    for level in (1, 4, 16):
        assert f"{100 * level:,.1f}" in text and f"{80 * level:,.1f}" in text
    assert text.count("1.25\N{MULTIPLICATION SIGN}") >= 3 + 2  # rows, best and worst
    assert "33.8 / 50.3 / 51.6" in text  # the recorded times to the first token
    assert text.count("tiny (baseline)") >= 2 * 3


@pytest.mark.parametrize("levels", [(1,), (1, 4, 16, 64), (3, 5, 6, 7, 8, 9)])
def test_every_chart_has_axes_with_units_and_is_whole(levels: tuple[int, ...], tmp_path: Path) -> None:
    page = Page(written(tmp_path, a_result(levels)))
    assert page.open == []
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(set(pictures)) == _CHARTS
    for label in ("output tokens per second", "concurrent requests", "median time per output token, ms"):
        assert label in page.text


def test_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    text = Page(written(tmp_path, a_result(faster=None))).text
    assert "baseline" not in text and "Best ratio" not in text


def test_nothing_in_a_result_becomes_markup(tmp_path: Path) -> None:
    result = replace(a_result(name=EVIL.replace("/", "|")), notes=(EVIL,), about={"lrq": EVIL, "date": EVIL})
    page = Page(written(tmp_path, result))
    assert page.open == [] and page.text.count(EVIL) >= 3
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_loads_nothing_and_takes_its_colours_from_the_style_sheet(tmp_path: Path) -> None:
    page = written(tmp_path, a_result())
    assert loads_nothing(page)
    assert not re.findall("#[0-9a-f]{6}", "".join(re.findall("<svg.*?</svg>", page, re.DOTALL)))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_a_browser_draws_the_charts_and_has_nothing_to_complain_of(tmp_path: Path) -> None:
    page = written(tmp_path, a_result())
    console, pixels = looked_at(tmp_path / "bench.html")
    assert console == []
    # What the check is worth: a page without its charts, and with a picture from elsewhere, passes neither.
    broken = re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL).replace(
        "</main>", '<img src="http://127.0.0.1:9/x.png"></main>'
    )
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    complaints, bare = looked_at(tmp_path / "broken.html")
    assert complaints
    for drawn, in_key in zip(pixels, bare, strict=True):
        assert drawn > in_key + 100 * _CHARTS


def looked_at(page: Path) -> tuple[list[str], list[int]]:
    """What a browser says on its console, and how many pixels of its picture have each series' colour."""
    assert CHROMIUM is not None
    shot = page.with_suffix(".png")
    ended = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1160,2600",
            f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={shot}", page.as_uri(),
        ],
        text=True, capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    rows = (255 * image.imread(shot)[..., :3]).round().astype(int)
    return (
        [line for line in ended.stderr.splitlines() if "CONSOLE" in line],
        [int((rows == colour).all(axis=-1).sum()) for colour in _SERIES],
    )
