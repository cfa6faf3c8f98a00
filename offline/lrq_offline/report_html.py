"""The report of a quantization as one HTML file: no script, nothing loaded from elsewhere, everything escaped."""

import math
from collections.abc import Callable, Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template

from lrq_offline.report_data import BlockResult, RunReport, Scalar, read_report
from lrq_offline.report_pictures import (
    amount,
    change_map,
    curves_of_blocks,
    error_chart,
    error_map,
    learning_curve,
    scientific,
    size_chart,
)
from lrq_vllm.checkpoint.store import replace_durably

__all__ = ["write_report"]

_WIDE, _NARROW = 900, 380
_MOST_SMALL_CURVES = 12  # blocks that get a picture each; above, all are in one
_MOST_PAIRED = 5  # blocks whose two maps fit beside each other


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the checkpoint in ``folder`` to ``output`` (default: lrq_report.html in it) and return its path.

    The file appears whole or not at all. Raises CheckpointError if lrq_report.json is missing or of an older form.
    """
    output = output or folder / "lrq_report.html"
    page = _page(read_report(folder))
    partial = output.with_name(f".{output.name}.partial")
    try:
        # A name that came from a file system may hold what UTF-8 has no bytes for.
        partial.write_bytes(page.encode("utf-8", "replace"))
        replace_durably(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def _page(report: RunReport) -> str:
    scheme, method = (str(report.settings[name]) for name in ("scheme", "method"))
    sections = (_warnings, _block_errors, _curves, _layer_errors, _sizes, _settings, _block_table, _layer_table)
    template = Template((files("lrq_offline") / "data" / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{report.model} {scheme} {method} - quantization report"),
        model=escape(report.model),
        subtitle=escape(f"{scheme}, learned with {method}" if _learned(report) else f"{scheme}, {method}"),
        tiles=_tiles(report),
        sections="\n".join(section(report) for section in sections),
        version=escape(report.tool_version),
    )


def _tiles(report: RunReport) -> str:
    last, count = report.blocks[-1], len(report.blocks)
    ratio = report.checkpoint_bytes / report.source_bytes
    sizes = f"{amount(report.linear_float_bytes)} \N{RIGHTWARDS ARROW} {amount(report.linear_bytes)}"
    learned = _learned(report)
    tiles = (
        ("Scheme", report.settings["scheme"], f"{report.linears} quantized linear layers"),
        ("Method", report.settings["method"], f"by lrq {report.tool_version}"),
        ("Blocks", count, f"{len(report.layer_names)} kinds of linear layers"),
        ("Time", _duration(report.seconds), f"{_duration(report.seconds / count)} per block"),
        ("Checkpoint", amount(report.checkpoint_bytes), f"{ratio:.1%} of {amount(report.source_bytes)}"),
        ("Quantized linears", f"{report.linear_bytes / report.linear_float_bytes:.1%}", sizes),
        ("Learning", _median_change(report) if learned else None, "median change of a block's error"),
        ("Error of the last block", scientific(last.error_after, 1),
         f"before learning {scientific(last.error_before, 1)}" if learned else "rounded to nearest"),
    )  # fmt: skip
    return "\n".join(
        f'<div><dt>{_text(name)}</dt><dd class="value">{_text(value)}</dd><dd class="note">{_text(note)}</dd></div>'
        for name, value, note in tiles
    )


def _warnings(report: RunReport) -> str:
    blocks_of: dict[str, dict[str, list[str]]] = {}  # by reason and layer name
    for block in report.blocks:
        for name, layer in block.layers.items():
            if layer.fallback is not None:
                blocks_of.setdefault(layer.fallback, {}).setdefault(name, []).append(str(block.block))
    items = [f"<li>{_text(warning)}</li>" for warning in report.warnings]
    for reason, layers in blocks_of.items():
        count = sum(len(blocks) for blocks in layers.values())
        where = "; ".join(f"{name} in block {', '.join(blocks)}" for name, blocks in layers.items())
        what = f"{count} {'layer' if count == 1 else 'layers'} only rounded to nearest: {reason.rstrip('.')}."
        items.append(f"<li>{_text(what)}<br><span>{_text(where)}</span></li>")
    if not items:
        about = "The calibration text was in order, and no layer fell back to rounding to nearest."
        return _section("No warnings", "", about, "fine")
    return _section("Warnings", f"<ul>{''.join(items)}</ul>", kind="warned")


def _block_errors(report: RunReport) -> str:
    about = "How far each block's output is from the float model's, with everything before it quantized too"
    about += ": rounded to nearest (before), and after learning." if _learned(report) else "."
    return _section("Error of each block", _figure(error_chart, report), about)


def _curves(report: RunReport) -> str:
    blocks = [block for block in report.blocks if block.curve.step]
    if not blocks:
        return ""
    if len(blocks) > _MOST_SMALL_CURVES:
        pictures = (
            ("Held-out text", curves_of_blocks(blocks, lambda curve: curve.held_out, "held-out-loss")),
            ("Training text", curves_of_blocks(blocks, lambda curve: curve.train, "training-loss")),
        )
        body = "".join(f"<figure><h3>{title}</h3>{picture}</figure>" for title, picture in pictures)
        return _section("Learning curves", f'<div class="curves pair">{body}</div>', "Loss of every block over its steps.")
    body = "".join(
        f"<figure><h3>Block {block.block}<span>{_change(block)}</span></h3>{learning_curve(block)}</figure>" for block in blocks
    )
    key = (
        '<ul class="key"><li style="--colour: var(--after)">held-out text</li>'
        '<li style="--colour: var(--before)">training text</li></ul>'
    )
    about = "Loss over the steps, each block on a scale of its own; beside its number, the change of its error."
    return _section("Learning curves", f'{key}<div class="curves">{body}</div>', about)


def _layer_errors(report: RunReport) -> str:
    about = "How far each linear layer's output is from the float layer's."
    maps = _figure(error_map, report, "Error")
    if any(layer.error_before != layer.error_after for block in report.blocks for layer in block.layers.values()):
        about += " Learning lowers the error of the block as a whole; single layers may lose."
        maps += _figure(change_map, report, "Change by learning")
    body = f'<div class="{"curves pair" if len(report.blocks) <= _MOST_PAIRED else "stack"}">{maps}</div>'
    if any(layer.fallback is not None for block in report.blocks for layer in block.layers.values()):
        body += '<ul class="key"><li class="dot" style="--colour: var(--warn)">only rounded to nearest</li></ul>'
    return _section("Error of each layer", body, about)


def _sizes(report: RunReport) -> str:
    about = "The rest are embeddings, norms and the output head, which keep their 16 bits."
    return _section("Size", _figure(size_chart, report), about)


def _settings(report: RunReport) -> str:
    items = "".join(
        f"<div><dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(value)}</dd></div>" for name, value in report.settings.items()
    )
    return _section("Settings", f'<dl class="settings">{items}</dl>')


def _block_table(report: RunReport) -> str:
    rows = []
    for block in report.blocks:
        worst, layer = max(block.layers.items(), key=lambda item: (math.isnan(item[1].error_after), item[1].error_after))
        fallen = sum(layer.fallback is not None for layer in block.layers.values())
        numbers = (
            scientific(block.error_before), scientific(block.error_after), _change(block), block.steps,
            f"{block.seconds:.1f}", fallen, scientific(layer.error_after),
        )  # fmt: skip
        cells = "".join(f"<td>{_text(number)}</td>" for number in numbers)
        rows.append(f'<tr><th>{block.block}</th>{cells}<td class="text">{_text(worst)}</td></tr>')
    headings = ("block", "error before", "after", "change", "steps", "seconds", "layers only rounded", "worst layer's error")
    return _section("Blocks", _table((*headings, "*worst layer"), rows), kind="long")


def _layer_table(report: RunReport) -> str:
    rows = []
    for block in report.blocks:
        cells = ""
        for name in report.layer_names:
            layer = block.layers.get(name)
            if layer is None:
                cells += "<td></td>"
                continue
            fell = ' class="fell"' if layer.fallback is not None else ""
            cells += f'<td{fell} title="before {scientific(layer.error_before)}">{scientific(layer.error_after)}</td>'
        rows.append(f"<tr><th>{block.block}</th>{cells}</tr>")
    table = _table(("block", *report.layer_names), rows)
    return f'<section class="long"><details><summary>Layers: errors as numbers</summary>{table}</details></section>'


def _section(title: str, body: str, about: str = "", kind: str = "") -> str:
    words = f"<p>{about}</p>" if about else ""
    return f'<section class="{kind}">\n<h2>{title}</h2>{words}\n{body}\n</section>'


def _figure(picture: Callable[[RunReport, int], str], report: RunReport, title: str = "") -> str:
    """A picture drawn twice: the style sheet shows the one that fits the window."""
    heading = f"<h3>{title}</h3>" if title else ""
    wide, narrow = (picture(report, width) for width in (_WIDE, _NARROW))
    return f'<figure>{heading}<div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


def _table(headings: Iterable[str], rows: Iterable[str]) -> str:
    """headings: a star before one of a column of text. rows: as HTML."""
    head = "".join(
        f'<th class="text">{_text(heading[1:])}</th>' if heading.startswith("*") else f"<th>{_text(heading)}</th>"
        for heading in headings
    )
    return (
        f'<div class="scroll"><table class="whole"><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _learned(report: RunReport) -> bool:
    return any(block.error_before != block.error_after for block in report.blocks)


def _change(block: BlockResult) -> str:
    """By how much learning changed a block's error: ``-42%``, with a real minus."""
    return _percent(block.error_after / block.error_before - 1) if block.error_before else ""


def _median_change(report: RunReport) -> str:
    changes = [block.error_after / block.error_before - 1 for block in report.blocks if block.error_before]
    finite = [change for change in changes if math.isfinite(change)]
    return _percent(median(finite)) if finite else ""


def _percent(change: float) -> str:
    if not math.isfinite(change):
        return ""
    return "0%" if round(change, 2) == 0 else f"{change:+.0%}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if seconds >= 10 * unit else 1}f} {name}"
    return f"{seconds / 3600:.1f} h"


def _text(value: Scalar) -> str:
    """A value as escaped text, safe between tags and inside quotes."""
    match value:
        case None:
            return "\N{EN DASH}"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case _:
            return escape(str(value))
