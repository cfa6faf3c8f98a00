"""Pictures for the pages: SVG to stand inside an HTML page, whose style sheet decides the colours and the font.

A picture is drawn with stand-in colours, which become ``var(--name)`` in the SVG: it follows the page from light to dark.
Units are CSS pixels. The same data gives the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Iterable
from html import escape

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = ["AFTER", "BEFORE", "INK", "LEVELS", "PAPER", "RAMPS", "REST", "WARN", "logarithmic", "span", "svg"]

# BEFORE and AFTER are also a baseline and what is compared with it.
INK, MUTED, LINE, PAPER, BEFORE, AFTER, REST, WARN = (f"#0101{index:02x}" for index in range(8))
_NAMES = dict(
    zip(
        (  # BEFORE and AFTER are also a baseline and what is compared with it.
            INK,
            MUTED,
            LINE,
            PAPER,
            BEFORE,
            AFTER,
            REST,
            WARN,
        ),
        ("ink", "muted", "line", "paper", "before", "after", "rest", "warn"),
        strict=True,
    )
)
LEVELS = 9
# Three ramps of nine colours: errors, changes (the middle one means none), depth in the model.
RAMPS = {
    name: tuple(f"#{row:02x}02{level:02x}" for level in range(LEVELS)) for row, name in enumerate(("heat", "change", "depth"))
}
_NAMES.update({colour: f"{name}-{level}" for name, ramp in RAMPS.items() for level, colour in enumerate(ramp)})

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lrq",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(draw: Callable[[Figure], None], width: float, height: float, name: str, label: str) -> str:
    """What ``draw`` puts on a figure of that size, as an ``<svg>`` element.

    name: of this picture and no other on its page. label: what a screen reader says.
    """
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None}, transparent=True)
    return _embedded(written.getvalue(), width, height, name, label)


def logarithmic(axes: Axes, values: Iterable[float], show: Callable[[float], str]) -> None:
    """A logarithmic y axis around the values, whose labels are enough also within one power of ten. show: writes a label."""
    low, high = span(values)
    axes.set_yscale("log")
    room = max((high / low) ** 0.08, 1.05)
    low, high = low / room, high * room
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.3 else (1.0, 2.0, 5.0)
    if decades > 0.7:
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.tick_params(axis="y", length=0)


def span(values: Iterable[float]) -> tuple[float, float]:
    """Least and greatest of the positive, finite values; never equal."""
    seen = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    return min(seen), max(max(seen), min(seen) * 1.01)


def _embedded(picture: str, width: float, height: float, name: str, label: str) -> str:
    """matplotlib's SVG file as an element of a page: no header, ids of its own, the page's colours and font."""
    drawn = picture[picture.index("<g ") : picture.rindex("</svg>")]

    def for_the_page(tag: re.Match[str]) -> str:
        text = re.sub(r'<g id="[^"]*"', "<g", tag[0])
        text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
        text = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-?0 [^\"]*\"", "", text)
        text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
        return re.sub("#[0-9a-f]{6}", lambda colour: f"var(--{_NAMES[colour[0]]})" if colour[0] in _NAMES else colour[0], text)

    body = re.sub("<[^>]*>", for_the_page, drawn)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width: {width * 1.15:g}px" role="img" '
        f'aria-label="{escape(label)}">\n{body}</svg>'
    )
