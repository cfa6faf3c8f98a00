"""The pictures of a bench: throughput, what it costs each user, and latencies. Units of sizes are CSS pixels."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lrq_server.bench_result import BenchResult, Measured
from lrq_server.load_generator import METRICS
from lrq_vllm.pages.pictures import AFTER, BEFORE, INK, PAPER, logarithmic, svg

__all__ = ["latency_chart", "throughput_chart", "trade_off_chart"]

_TIMES = "\N{MULTIPLICATION SIGN}"


def throughput_chart(result: BenchResult, width: int) -> str:
    """Output tokens/s over the concurrency, with the ratio to the baseline at each of the model's points."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for measured, colour in _series(result):
            tokens = [point.output_tokens_per_s for point in measured.points]
            axes.plot(result.settings.concurrency, tokens, "o-", color=colour, linewidth=2, markersize=6)
        ratios = result.ratios()
        for point in result.model.points if ratios else ():
            ratio = ratios[point.concurrency]
            # Beside the model's line, on the side where the baseline's is not.
            offset, side = ((-5, 6), "right") if ratio >= 1 else ((6, -14), "left")
            axes.annotate(
                f"{ratio:.2f}{_TIMES}", (point.concurrency, point.output_tokens_per_s), offset,
                textcoords="offset points", ha=side, weight="bold", color=INK,
            )  # fmt: skip
        _concurrency_axis(axes, result.settings.concurrency)
        _tokens_axis(axes, result)

    return svg(draw, width, 320 if width > 600 else 260, f"throughput-{width}", "Output tokens per second by concurrency")


def trade_off_chart(result: BenchResult, width: int) -> str:
    """Output tokens/s of all together over the median time that each user waits for a token; numbers are concurrencies."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid()
        for measured, colour in _series(result):
            x = [point.latency_ms["tpot"][50] for point in measured.points]
            y = [point.output_tokens_per_s for point in measured.points]
            axes.plot(x, y, "o-", color=colour, linewidth=2, markersize=6)
            for point, at in zip(measured.points, zip(x, y, strict=True), strict=True):
                axes.annotate(str(point.concurrency), at, (-5, 5), textcoords="offset points", ha="right", color=INK)
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        axes.set_xlabel("median time per output token, ms")
        axes.tick_params(length=0)
        _tokens_axis(axes, result)

    return svg(draw, width, 320 if width > 600 else 260, f"trade-off-{width}", "Output tokens per second by time per token")


def latency_chart(result: BenchResult, metric: str) -> str:
    """A latency over the concurrency: the median, and dashed the 99th percentile. metric: a name of METRICS."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        levels = result.settings.concurrency
        every = [
            point.latency_ms[metric][percentile]
            for measured in result.measured() for point in measured.points for percentile in (50, 99)
        ]  # fmt: skip
        logarithmic(axes, every, lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.3g}")
        for measured, colour in reversed(_series(result)):
            middle, tail = ([point.latency_ms[metric][percentile] for point in measured.points] for percentile in (50, 99))
            axes.plot(levels, tail, "o--", color=colour, linewidth=1.4, markersize=5, markerfacecolor=PAPER)
            axes.plot(levels, middle, "o-", color=colour, linewidth=2, markersize=5)
        _concurrency_axis(axes, levels)
        axes.set_ylabel("ms")

    return svg(draw, 440, 260, f"latency-{metric}", f"{METRICS[metric][1]} by concurrency".capitalize())


def _series(result: BenchResult) -> list[tuple[Measured, str]]:
    """The baseline before the model, which is drawn over it."""
    colours = {id(result.model): AFTER, id(result.baseline): BEFORE}
    return [(measured, colours[id(measured)]) for measured in reversed(result.measured())]


def _concurrency_axis(axes: Axes, levels: Sequence[int]) -> None:
    """Logarithmic, with the levels as ticks and half a power of two of room beside them."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(levels[0] / 1.4, levels[-1] * 1.4)
    axes.xaxis.set_major_locator(FixedLocator(list(levels)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.tick_params(length=0)
    axes.set_xlabel("concurrent requests")


def _tokens_axis(axes: Axes, result: BenchResult) -> None:
    most = max(point.output_tokens_per_s for measured in result.measured() for point in measured.points)
    axes.set_ylim(0, 1.15 * most)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if most >= 10 else f"{value:g}"))
    axes.set_ylabel("output tokens per second")
