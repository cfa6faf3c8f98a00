"""/lrq/report: one page that shows what a server does, while it does it.

The page itself holds nothing of the model: its script (live_page.js) asks /metrics, and /lrq/info with the key that its reader
gives it, if the server has one.
"""

from functools import cache
from importlib.metadata import version
from importlib.resources import files

from lrq_vllm.pages.html import page, section, text

__all__ = ["live_page"]

_TILES = (
    ("Output tokens/s", "now"),
    ("First token", "median of those just begun"),
    ("KV cache", "in use"),
    ("Requests", "running and waiting"),
)
_KEY = (
    '<form id="ask"{hidden}><label>The server asks for its API key to say more: '
    '<input type="password" autocomplete="off"></label> <button>Show</button></form>'
)


@cache
def live_page(needs_key: bool) -> str:
    """HTML. needs_key: whether /lrq/info does; else the page asks for it at once."""
    form = _KEY.format(hidden="" if needs_key else " hidden")
    counted = '<div id="clipping">Nothing counts it here.</div>'
    sections = (
        _chart("throughput", "Throughput", "Tokens per second.", ("output", "prompt")),
        _chart("latency", "Latency", "Milliseconds, medians of the last seconds.", ("each later token", "first token")),
        _chart("cache", "KV cache", "Percent in use.", ("in use",)),
        section("Clipped by quantization", counted, "Of what comes into a layer; the most first."),
        section("Quality", f'{form}<div id="quality"></div>', "Relative error of each block's output, when it was quantized."),
        section("Kernels", '<div id="kernels"></div>', "What the layers run on."),
    )
    numbers = "<code>/metrics</code>, <code>/lrq/info</code>"
    return page(
        kind="Live",
        title="lrq-server",
        heading="What this server does",
        subtitle="",
        tiles=[(name, None, note) for name, note in _TILES],
        sections="\n".join(sections),
        footer=f"lrq {text(version('lrq'))}. The numbers, asked for every two seconds: {numbers}.",
        script=(files("lrq_server") / "live_page.js").read_text(encoding="utf-8"),
    )


def _chart(name: str, title: str, about: str, series: tuple[str, ...]) -> str:
    colours = zip(("after", "before"), series, strict=False)
    items = "".join(f'<li style="--colour: var(--{colour})">{label}</li>' for colour, label in colours)
    return section(title, f'<ul class="key">{items}</ul><figure id="{name}"></figure>', about)
