"""/lrq/report in a browser, beside a server whose numbers grow."""

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from fastapi import FastAPI
from matplotlib import image
from starlette.responses import PlainTextResponse

from lrq_server.app import Additions, with_additions
from lrq_server.limits import RequestGate
from lrq_server.live_page import live_page
from lrq_server.readiness import Readiness
from lrq_server.serve_settings import ServeSettings
from lrq_server.web_server import answering
from tests.html_pages import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert('x')</script>"
# Of the first series on the light page, as red, green and blue.
BLUE = (0x24, 0x63, 0xC4)
INFO = {
    "model": {"names": [EVIL]}, "scheme": "w8a8", "kv_bits": 16, "vllm_version": "0.32.0", "self_test": {"result": "passed"},
    "kernels": {"layers.0.up": "hopper", "layers.1.up": "hopper"},
    "quality": {"method": "lrq", "blocks": [{"block": 1, "error_before": 0.02, "error_after": None}]},
}  # fmt: skip


def metrics(asked: int) -> str:
    """After so many looks, two seconds of the page's clock apart: 200 tokens and two first tokens of 30 ms more each time."""
    return f"""# HELP vllm:generation_tokens_total Tokens.
vllm:generation_tokens_total{{engine="0",model_name="{EVIL}"}} {200.0 * asked}
vllm:prompt_tokens_total{{engine="0"}} {1000.0 * asked}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.02"}} 0.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.04"}} {2.0 * asked}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf"}} {2.0 * asked}
vllm:kv_cache_usage_perc{{engine="0"}} 0.25
vllm:num_requests_running{{engine="0"}} 3.0
vllm:num_requests_waiting{{engine="0"}} 1.0
lrq_clipped_share{{module="layers.0.up"}} 0.001
lrq_clipped_share{{module="layers.1.up"}} 0.02
"""


def app(keys: tuple[str, ...] = ()) -> FastAPI:
    made, asked = FastAPI(), 0

    @made.get("/metrics")
    async def answer() -> PlainTextResponse:
        nonlocal asked
        asked += 1
        return PlainTextResponse(metrics(asked))

    async def nothing() -> None:
        pass

    readiness = Readiness()
    gate = RequestGate(ServeSettings(), readiness, lambda reason: None)
    return with_additions(made, Additions(readiness, gate, INFO, keys, nothing))  # type: ignore[return-value]


def looked_at(application: FastAPI, folder: Path) -> tuple[list[str], str, int]:
    """What a browser says on its console, the page without its script after some looks, and the pixels of the first colour."""
    assert CHROMIUM is not None
    shot = folder / "page.png"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/lrq/report"
        with answering(application, listener, {"log_config": None}):
            ended = subprocess.run(
                [
                    CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                    "--window-size=1160,2000", f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}", "--dump-dom",
                    "--virtual-time-budget=60000", url,
                ],
                text=True, capture_output=True, timeout=120, check=True,
            )  # fmt: skip
    rows = (255 * image.imread(shot)[..., :3]).round().astype(int)
    console = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    page = re.sub("<script>.*</script>", "", ended.stdout, flags=re.DOTALL)
    return console, page, int((rows == BLUE).all(axis=-1).sum())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_a_browser_shows_the_numbers_as_they_grow(tmp_path: Path) -> None:
    console, page, blue = looked_at(app(), tmp_path)
    assert console == []
    text = Page(page).text
    values = re.findall(r'<dd class="value">(.*?)</dd>', page)
    assert float(values[0].replace(",", "")) > 0
    # All first tokens came between 20 and 40 ms, of which 30 is the middle.
    assert values[1:] == ["30 ms", "25%", "3 + 1"]
    for name in ("throughput", "latency", "cache"):
        (lines,) = re.findall(rf'<figure id="{name}">(.*?)</figure>', page)
        assert re.search(r'<path d="M[\d. ]+L', lines)  # two looks at least
    assert blue > 500  # the keys of the three charts are 162
    # The most clipped layer first.
    assert "layers.1.up2%layers.0.up0.1%" in text
    assert "Quantized by lrq." in text and "2.00e-2" in text and "hopper" in text
    assert EVIL in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_with_a_key_the_page_says_nothing_of_the_model_before_it_has_it(tmp_path: Path) -> None:
    console, page, _ = looked_at(app(keys=("secret",)), tmp_path)
    assert console == []
    assert "Quantized by" not in page and "API key" in Page(page).text
    assert re.search(r"<form id=.ask.>", page)


def test_the_page_asks_its_own_server_only() -> None:
    page = live_page(False)
    targets = [value for _, attributes in Page(page).tags for name, value in attributes.items() if name in ("src", "href")]
    assert targets == ["data:,"]
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    assert "connect-src 'self'" in page
