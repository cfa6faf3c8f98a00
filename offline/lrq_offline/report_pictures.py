"""The pictures of a report. Units are CSS pixels. The same data gives the same bytes."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from lrq_vllm.checkpoint.report import BlockResult, Curve, LayerResult, RunReport
from lrq_vllm.pages.pictures import AFTER, BEFORE, INK, LEVELS, PAPER, RAMPS, REST, WARN, logarithmic, span, svg

__all__ = ["amount", "change_map", "curves_of_blocks", "error_chart", "error_map", "learning_curve", "scientific", "size_chart"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NARROWEST = 380  # a map of few blocks still has room for its scale
_UNITS = ("B", "kB", "MB", "GB", "TB")
_TIMES = "\N{MULTIPLICATION SIGN}"


def scientific(value: float, digits: int = 2) -> str:
    """0.00123 as 1.23 x 10^-3, in Unicode; 0, infinity and NaN as such."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}{_TIMES}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def amount(size_bytes: float) -> str:
    """Bytes to three figures in decimal units: 1_234_000 as 1.23 MB."""
    power = next((power for power in range(4) if size_bytes < 999.5 * 1000**power), 4)
    figures = size_bytes / 1000**power
    return f"{figures:.{0 if power == 0 or figures >= 99.95 else 1 if figures >= 9.995 else 2}f} {_UNITS[power]}"


def error_chart(report: RunReport, width: int) -> str:
    """Each block's error before and after learning, joined; the errors alone if learning changed none."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        x = [block.block for block in report.blocks]
        before = [_visible(block.error_before) for block in report.blocks]
        after = [_visible(block.error_after) for block in report.blocks]
        size = max(3.0, min(7.0, 0.35 * width / len(x)))
        logarithmic(axes, [*before, *after], _short)
        axes.grid(axis="y")
        if before != after:
            axes.vlines(x, before, after, color=BEFORE, linewidth=size / 3.5, alpha=0.7)
            axes.plot(x, before, "o", color=PAPER, mec=BEFORE, mew=1.5, markersize=size, label="before")
        axes.plot(x, after, "o", color=AFTER, markersize=size, label="after learning")
        if before != after:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handletextpad=0.2, borderaxespad=0)
        _block_axis(axes, x, width)
        axes.margins(x=min(0.05, 0.4 / len(x)) if len(x) > 1 else 0.5)
        axes.set_ylabel("relative error")

    return svg(draw, width, 300 if width > 600 else 240, f"errors-{width}", "Relative error of each block")


def learning_curve(block: BlockResult) -> str:
    """One block's loss over the steps, on texts that it learns from and on texts held out."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        curve = block.curve
        train, held_out = _gaps(curve.train), _gaps(curve.held_out)
        logarithmic(axes, [*train, *held_out], _short)
        axes.grid(axis="y")
        axes.plot(curve.step, train, color=BEFORE, linewidth=1.5)
        axes.plot(curve.step, held_out, color=AFTER, linewidth=2)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.02)

    return svg(draw, 280, 165, f"curve-{block.block}", f"Learning curve of block {block.block}")


def curves_of_blocks(blocks: Sequence[BlockResult], loss: Callable[[Curve], tuple[float | None, ...]], name: str) -> str:
    """One loss of all blocks over the steps, coloured by depth; ``name`` says which loss."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        # Held-out and training pictures stand side by side: one scale for both.
        logarithmic(axes, [value for block in blocks for value in _gaps([*block.curve.train, *block.curve.held_out])], _short)
        axes.grid(axis="y")
        for index, block in enumerate(blocks):
            colour = RAMPS["depth"][index * LEVELS // len(blocks)]
            axes.plot(block.curve.step, _gaps(loss(block.curve)), color=colour, linewidth=1.3)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.02 * max(1, *(block.curve.step[-1] for block in blocks)))
        bounds = [blocks[0].block + (blocks[-1].block - blocks[0].block) * level / LEVELS for level in range(LEVELS + 1)]
        mappable = ScalarMappable(BoundaryNorm(bounds, LEVELS), ListedColormap(RAMPS["depth"]))
        _colour_bar(figure, mappable, "block", [bounds[0], bounds[-1]], lambda block: f"{block:.0f}", 0.5, axes)

    return svg(draw, 440, 300, f"curves-{name}", f"{name} of all blocks".capitalize())


def error_map(report: RunReport, width: int) -> str:
    """The error of every layer after learning: layer names by blocks. A dot marks what fell back to rounding to nearest."""
    errors = _by_layer(report, lambda layer: layer.error_after)
    low, high = span(value for row in errors for value in row)
    bounds = [low * (high / low) ** (level / LEVELS) for level in range(LEVELS + 1)]
    return _map(report, width, errors, "heat", bounds, "relative error", lambda error: scientific(error, 1))


def change_map(report: RunReport, width: int) -> str:
    """How many times smaller or larger learning made the error of every layer: layer names by blocks."""
    factors = _by_layer(report, lambda layer: layer.error_after / layer.error_before if layer.error_before else math.nan)
    low, high = span(value for row in factors for value in row)
    # At least ten per cent either way, so that noise about 1 is not painted in full colour.
    most = max(high, 1 / low, 1.1)
    bounds = [most ** (2 * level / LEVELS - 1) for level in range(LEVELS + 1)]
    return _map(report, width, factors, "change", bounds, "error after / before", lambda factor: f"{factor:.2f}")


def size_chart(report: RunReport, width: int) -> str:
    """Bytes of the float model and of the checkpoint, split into the quantized linear layers and the rest."""
    rows = (
        ("before", report.linear_float_bytes, report.source_bytes),
        ("after", report.linear_bytes, report.checkpoint_bytes),
    )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = [name for name, _, _ in rows]
        linears, totals = [part for _, part, _ in rows], [total for _, _, total in rows]
        rests = [total - part for part, total in zip(linears, totals, strict=True)]
        for sizes, left, colour, label in ((linears, [0, 0], AFTER, "quantized linears"), (rests, linears, REST, "the rest")):
            bars = axes.barh(names, sizes, left=left, height=0.56, color=colour, label=label)
            inside = [amount(size) if size > 0.16 * max(totals) * 500 / width else "" for size in sizes]
            axes.bar_label(bars, inside, label_type="center", color=PAPER)
        for row, total in enumerate(totals):
            axes.annotate(amount(total), (total, row), (8, 0), textcoords="offset points", va="center", weight="bold")
        axes.invert_yaxis()
        axes.set_xlim(0, max(totals) * (1 + 85 / width))
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK, pad=6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handlelength=1, handleheight=1)

    return svg(draw, width, 150, f"sizes-{width}", "Sizes before and after")


def _map(
    report: RunReport,
    width: int,
    values: list[list[float]],
    ramp: str,
    bounds: list[float],
    label: str,
    show: Callable[[float], str],
) -> str:
    blocks, names = report.blocks, report.layer_names
    longest = int(0.055 * width)  # letters that leave more than half of the width to the cells
    labels = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
    margin = 20 + 7 * max(len(label) for label in labels)
    cell = min(72.0, (width - margin) / len(blocks))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        x = [block.block for block in blocks]
        gap = min(2.0, cell / 8)
        norm, colours = BoundaryNorm(bounds, LEVELS, clip=True), ListedColormap(RAMPS[ramp])
        edges = [*(block - 0.5 for block in x), x[-1] + 0.5], [row - 0.5 for row in range(len(names) + 1)]
        shown = np.array(values)  # NaN leaves a cell empty
        cells = axes.pcolormesh(*edges, shown, cmap=colours, norm=norm, edgecolors=PAPER, linewidth=gap)
        for row, column in np.ndindex(shown.shape) if cell > 58 else ():
            if math.isfinite(value := values[row][column]):
                # Cells of both ends of a ramp are far from the page's colour, and so is their text.
                strong = norm(value) > 4 if ramp == "heat" else abs(norm(value) - 4) > 2
                colour = PAPER if strong else INK
                text = axes.text(x[column], row, show(value), color=colour, size=11, ha="center", va="center_baseline")
                text.set_in_layout(False)  # it lies within its cell; asking takes long
        fallen = [(block.block, name) for block in blocks for name in block.layers if block.layers[name].fallback is not None]
        corner = 0.36 if cell > 30 else 0
        axes.plot(
            [block + corner for block, _ in fallen], [names.index(name) - corner * 0.75 for _, name in fallen], "o",
            color=WARN, markeredgecolor=PAPER, markeredgewidth=0.8, markersize=max(4.5, min(7.0, cell / 3)),
        )  # fmt: skip
        axes.invert_yaxis()
        axes.set_yticks(range(len(names)), labels, color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _block_axis(axes, x, width)
        _colour_bar(figure, cells, label, bounds[:: LEVELS // 3], show, min(1.0, 300 / (cell * len(blocks))))

    drawn = max(margin + cell * len(blocks), _NARROWEST)
    return svg(draw, drawn, 120 + 27 * len(names), f"{ramp}-{width}", f"{label} of every layer".capitalize())


def _by_layer(report: RunReport, value: Callable[[LayerResult], float]) -> list[list[float]]:
    """A value by layer name and block; NaN where a block has no such layer or the value has no logarithm."""
    return [
        [_visible(value(block.layers[name])) if name in block.layers else math.nan for block in report.blocks]
        for name in report.layer_names
    ]


def _colour_bar(
    figure: Figure,
    mappable: ScalarMappable,
    label: str,
    ticks: Sequence[float],
    show: Callable[[float], str],
    shrink: float,
    axes: Axes | None = None,
) -> None:
    bar = figure.colorbar(mappable, ax=axes, location="bottom", shrink=shrink, aspect=28, spacing="uniform", pad=0.04)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=11)
    bar.set_label(label)
    bar.set_ticks(ticks, labels=[show(tick) for tick in ticks])
    # The outer labels stay within the bar, so that they take no width from the picture.
    labels = bar.ax.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")


def _short(value: float) -> str:
    """A tick's label: scientific with no more digits than it has."""
    digits = next((digits for digits in range(4) if math.isclose(float(f"{value:.{digits}e}"), value, rel_tol=1e-6)), 2)
    return scientific(value, digits).removeprefix(f"1{_TIMES}")


def _block_axis(axes: Axes, blocks: Sequence[int], width: float) -> None:
    """Block numbers below, as many as ``width`` has room for: the first, then round ones."""
    every = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, len(blocks)) if len(blocks) / step <= width / 55)
    round_ones = [block for block in blocks if block % every == 0 and block - blocks[0] >= every / 2]
    axes.xaxis.set_major_locator(FixedLocator([blocks[0], *round_ones]))
    axes.set_xlabel("block")


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else _visible(value) for value in values]


def _visible(value: float) -> float:
    """The value, or NaN, which is not drawn, if it has no place on a logarithmic axis."""
    return value if math.isfinite(value) and value > 0 else math.nan
