"""A bench as one HTML file."""

from functools import partial
from pathlib import Path

from lrq_server.bench_pictures import latency_chart, throughput_chart, trade_off_chart
from lrq_server.bench_result import BenchResult
from lrq_server.load_generator import METRICS, PERCENTILES
from lrq_vllm.pages.html import figure, page, section, settings_list, table, text, write_page

__all__ = ["write_html"]

_TIMES = "\N{MULTIPLICATION SIGN}"
_FOOTER = (
    "Written by lrq {version} from measurements of <code>vllm bench serve</code>. Unrounded numbers: bench.json, bench.csv."
)


def write_html(result: BenchResult, path: Path) -> None:
    """Charts and tables of everything that was measured."""
    model, baseline = result.model.endpoint, result.baseline
    load = f"{_lengths(result)}, {result.settings.concurrency[0]} to {result.settings.concurrency[-1]} requests at a time"
    against = "" if baseline is None else f" against {baseline.endpoint.short_name}"
    sections = (_notes, _throughput, _trade_off, _latencies, _numbers, _percentiles, _settings)
    write_page(
        page(
            kind="Serving benchmark",
            title=f"{model.short_name}{against} - serving benchmark",
            heading=f"{model.short_name}{against}",
            subtitle=load,
            tiles=_tiles(result),
            sections="\n".join(part(result) for part in sections),
            footer=_FOOTER.format(version=text(result.about["lrq"])),
        ),
        path,
    )


def _lengths(result: BenchResult) -> str:
    settings = result.settings
    if isinstance(settings.prompts, Path):
        return f"prompts of {settings.prompts.name}, {settings.output_tokens} tokens each in answer"
    return f"{settings.prompts} prompts of {settings.input_tokens} tokens, {settings.output_tokens} in answer"


def _tiles(result: BenchResult) -> list[tuple[str, str, str]]:
    best = max(result.model.points, key=lambda point: point.output_tokens_per_s)
    lone = result.model.points[0]
    requests = sum(point.requests for point in result.model.points)
    speed = ("Most output tokens/s", f"{best.output_tokens_per_s:,.0f}", f"at concurrency {best.concurrency}")
    first = ("First token", f"{lone.latency_ms['ttft'][50]:,.1f} ms", f"median at concurrency {lone.concurrency}")
    if result.baseline is None:
        later = ("Each later token", f"{lone.latency_ms['tpot'][50]:,.1f} ms", f"median at concurrency {lone.concurrency}")
        return [speed, first, later, ("Requests", f"{requests:,}", "all answered, without the warm-up")]
    by_ratio = sorted(result.ratios().items(), key=lambda item: item[1])
    least, most = (
        (f"{ratio:.2f}{_TIMES}", f"of the baseline's tokens/s, at concurrency {level}")
        for level, ratio in (by_ratio[0], by_ratio[-1])
    )
    return [("Best ratio", *most), ("Worst ratio", *least), speed, first]


def _notes(result: BenchResult) -> str:
    if not result.notes:
        return ""
    return section("Notes", f"<ul>{''.join(f'<li>{text(note)}</li>' for note in result.notes)}</ul>", kind="warned")


def _key(result: BenchResult) -> str:
    colours = {id(result.model): "after", id(result.baseline): "before"}
    items = "".join(
        f'<li style="--colour: var(--{colours[id(measured)]})">{text(result.label(measured))}</li>'
        for measured in result.measured()
    )
    return f'<ul class="key">{items}</ul>'


def _throughput(result: BenchResult) -> str:
    about = "Output tokens per second of all requests together"
    about += "; numbers are the ratio to the baseline." if result.baseline is not None else "."
    return section("Throughput", _key(result) + figure(partial(throughput_chart, result)), about)


def _trade_off(result: BenchResult) -> str:
    about = "Up is more for all, left is faster for each. Numbers are the requests at a time."
    return section(
        "Throughput against the speed that each user sees", _key(result) + figure(partial(trade_off_chart, result)), about
    )


def _latencies(result: BenchResult) -> str:
    pictures = "".join(
        f"<figure><h3>{words.capitalize()} ({name.upper()})</h3>{latency_chart(result, name)}</figure>"
        for name, (_, words) in METRICS.items()
    )
    about = "Medians, and dashed the 99th percentiles, on logarithmic scales."
    return section("Latency", f'{_key(result)}<div class="curves pair">{pictures}</div>', about)


def _numbers(result: BenchResult) -> str:
    ratios, rows = result.ratios(), []
    for index, concurrency in enumerate(result.settings.concurrency):
        for measured in result.measured():
            point = measured.points[index]
            ratio = f"{ratios[concurrency]:.2f}{_TIMES}" if ratios and measured is result.model else ""
            numbers = (
                f"{point.output_tokens_per_s:,.1f}", ratio, f"{point.requests_per_s:,.2f}", f"{point.requests:,}",
                f"{point.duration_s:,.1f}", f"{point.input_tokens:,}", f"{point.output_tokens:,}",
            )  # fmt: skip
            cells = "".join(f"<td>{text(number)}</td>" for number in numbers)
            rows.append(f'<tr><th>{concurrency}</th><td class="text">{text(result.label(measured))}</td>{cells}</tr>')
    headings = (
        "concurrency",
        "*server",
        "output tokens/s",
        "ratio",
        "requests/s",
        "requests",
        "seconds",
        "tokens in",
        "tokens out",
    )
    return section("Numbers", table(headings, rows), kind="long")


def _percentiles(result: BenchResult) -> str:
    rows = []
    for index, concurrency in enumerate(result.settings.concurrency):
        for measured in result.measured():
            latencies = measured.points[index].latency_ms
            cells = "".join(
                f"<td>{' / '.join(f'{latencies[name][percentile]:,.1f}' for percentile in PERCENTILES)}</td>"
                for name in METRICS
            )
            rows.append(f'<tr><th>{concurrency}</th><td class="text">{text(result.label(measured))}</td>{cells}</tr>')
    about = (
        f"In milliseconds, the percentiles {' / '.join(map(str, PERCENTILES))}. "
        f"{'; '.join(f'{name.upper()}: {words}' for name, (_, words) in METRICS.items())}."
    )
    headings = ("concurrency", "*server", *(name.upper() for name in METRICS))
    return section("Latencies", table(headings, rows), text(about), kind="long")


def _settings(result: BenchResult) -> str:
    settings = result.settings
    shown: dict[str, str | int | None] = {
        "prompts": str(settings.prompts),
        "input_tokens": settings.input_tokens if isinstance(settings.prompts, str) else None,
        "output_tokens": settings.output_tokens,
        "seed": settings.seed,
        "model": result.model.endpoint.model,
        "model_server": result.model.endpoint.server,
    }
    if result.baseline is not None:
        shown |= {"baseline": result.baseline.endpoint.model, "baseline_server": result.baseline.endpoint.server}
    return section("Settings", settings_list(shown | dict(result.about)))
