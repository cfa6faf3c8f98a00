"""The report of a quantization as one HTML file."""

import math
from functools import partial
from pathlib import Path
from statistics import median

from lrq_offline.config import HELD_OUT_SHARE
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
from lrq_vllm.checkpoint.report import BlockResult, RunReport, Scalar, read_report
from lrq_vllm.pages.html import figure, page, section, settings_list, table, text, write_page

__all__ = ["write_report"]

_FOOTER = """Written by lrq {version} from lrq_report.json. Errors are relative squared errors on the calibration text:
|quantized output &minus; float output|&sup2; / |float output|&sup2;.{weighed}"""
_WEIGHED = """ Those of blocks, and the losses, weigh each difference by what it does to the model's predictions (loss fisher):
they do not compare with those of another loss, or of a method that learns nothing."""
_NEAREST = "rounded to nearest"
_MOST_SMALL_CURVES = 12  # blocks that get a picture each; above, all are in one
_MOST_PAIRED = 5  # blocks whose two maps fit beside each other


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the checkpoint in ``folder`` to ``output`` (default: lrq_report.html in it) and return its path.

    The file appears whole or not at all. Raises CheckpointError if lrq_report.json is missing or of an older form.
    """
    output = output or folder / "lrq_report.html"
    write_page(_page(read_report(folder)), output)
    return output


def _page(report: RunReport) -> str:
    scheme, method = (str(report.settings[name]) for name in ("scheme", "method"))
    sections = (_warnings, _block_errors, _curves, _layer_errors, _sizes, _settings, _block_table, _layer_table)
    return page(
        kind="Quantization report",
        title=f"{report.model} {scheme} {method} - quantization report",
        heading=report.model,
        subtitle=f"{scheme}, learned with {method}" if _learned(report) else f"{scheme}, {method}",
        tiles=_tiles(report),
        sections="\n".join(part(report) for part in sections),
        footer=_FOOTER.format(
            version=text(report.tool_version), weighed=_WEIGHED if report.settings.get("loss") == "fisher" else ""
        ),
    )


def _tiles(report: RunReport) -> tuple[tuple[str, Scalar, str], ...]:
    last, count = report.blocks[-1], len(report.blocks)
    ratio = report.checkpoint_bytes / report.source_bytes
    sizes = f"{amount(report.linear_float_bytes)} \N{RIGHTWARDS ARROW} {amount(report.linear_bytes)}"
    learned = _learned(report)
    return (
        ("Scheme", report.settings["scheme"], f"{report.linears} quantized linear layers"),
        ("Method", report.settings["method"], f"by lrq {report.tool_version}"),
        ("Blocks", count, f"{len(report.layer_names)} kinds of linear layers"),
        ("Time", _duration(report.seconds), f"{_duration(report.seconds / count)} per block"),
        ("Checkpoint", amount(report.checkpoint_bytes), f"{ratio:.1%} of {amount(report.source_bytes)}"),
        ("Quantized linears", f"{report.linear_bytes / report.linear_float_bytes:.1%}", sizes),
        ("Learning", _median_change(report) if learned else None, "median change of a block's error"),
        ("Error of the last block", scientific(last.error_after, 1),
         f"before learning {scientific(last.error_before, 1)}" if learned else _without_learning(report)),
    )  # fmt: skip


def _warnings(report: RunReport) -> str:
    blocks_of: dict[str, dict[str, list[str]]] = {}  # by reason and layer name
    for block in report.blocks:
        for name, layer in block.layers.items():
            if layer.fallback is not None:
                blocks_of.setdefault(layer.fallback, {}).setdefault(name, []).append(str(block.block))
    items = [f"<li>{text(warning)}</li>" for warning in report.warnings]
    for reason, layers in blocks_of.items():
        count = sum(len(blocks) for blocks in layers.values())
        where = "; ".join(f"{name} in block {', '.join(blocks)}" for name, blocks in layers.items())
        what = f"{count} {'layer' if count == 1 else 'layers'} only rounded to nearest: {reason.rstrip('.')}."
        items.append(f"<li>{text(what)}<br><span>{text(where)}</span></li>")
    if not items:
        about = "The calibration text was in order, and no layer fell back to rounding to nearest."
        return section("No warnings", "", about, "fine")
    return section("Warnings", f"<ul>{''.join(items)}</ul>", kind="warned")


def _block_errors(report: RunReport) -> str:
    inputs = "as in the float model" if report.settings.get("learn_inputs") == "float" else "quantized too"
    about = f"How far each block's output is from the float model's, with everything before it {inputs}"
    about += f": {_without_learning(report)} (before), and after learning." if _learned(report) else "."
    return section("Error of each block", figure(partial(error_chart, report)), about)


def _checked_on(report: RunReport) -> str:
    """What the state that is kept was chosen by."""
    samples = report.settings.get("samples")
    none = isinstance(samples, int) and samples < HELD_OUT_SHARE
    return f"all text (none is held out of fewer than {HELD_OUT_SHARE} windows)" if none else "held-out text"


def _curves(report: RunReport) -> str:
    blocks = [block for block in report.blocks if block.curve.step]
    if not blocks:
        return ""
    if len(blocks) > _MOST_SMALL_CURVES:
        pictures = (
            (_checked_on(report).capitalize(), curves_of_blocks(blocks, lambda curve: curve.held_out, "held-out-loss")),
            ("Training text", curves_of_blocks(blocks, lambda curve: curve.train, "training-loss")),
        )
        body = "".join(f"<figure><h3>{title}</h3>{picture}</figure>" for title, picture in pictures)
        return section("Learning curves", f'<div class="curves pair">{body}</div>', "Loss of every block over its steps.")
    body = "".join(
        f"<figure><h3>Block {block.block}<span>{_change(block)}</span></h3>{learning_curve(block)}</figure>" for block in blocks
    )
    key = (
        f'<ul class="key"><li style="--colour: var(--after)">{_checked_on(report)}</li>'
        '<li style="--colour: var(--before)">training text</li></ul>'
    )
    about = "Loss over the steps, each block on a scale of its own; beside its number, the change of its error."
    return section("Learning curves", f'{key}<div class="curves">{body}</div>', about)


def _layer_errors(report: RunReport) -> str:
    about = "How far each linear layer's output is from the float layer's."
    maps = figure(partial(error_map, report), "Error")
    if any(layer.error_before != layer.error_after for block in report.blocks for layer in block.layers.values()):
        if _learned(report):
            about += " Learning lowers the error of the block as a whole; single layers may lose."
        nearest = _without_learning(report) == _NEAREST
        maps += figure(partial(change_map, report), "Change by learning" if nearest else "Change against rounding to nearest")
    body = f'<div class="{"curves pair" if len(report.blocks) <= _MOST_PAIRED else "stack"}">{maps}</div>'
    if any(layer.fallback is not None for block in report.blocks for layer in block.layers.values()):
        body += '<ul class="key"><li class="dot" style="--colour: var(--warn)">only rounded to nearest</li></ul>'
    return section("Error of each layer", body, about)


def _sizes(report: RunReport) -> str:
    about = "The rest are embeddings, norms and the output head, which keep their 16 bits."
    return section("Size", figure(partial(size_chart, report)), about)


def _settings(report: RunReport) -> str:
    return section("Settings", settings_list(report.settings))


def _block_table(report: RunReport) -> str:
    rows = []
    for block in report.blocks:
        worst, layer = max(block.layers.items(), key=lambda item: (math.isnan(item[1].error_after), item[1].error_after))
        fallen = sum(layer.fallback is not None for layer in block.layers.values())
        numbers = (
            scientific(block.error_before), scientific(block.error_after), _change(block), block.steps,
            f"{block.seconds:.1f}", fallen, scientific(layer.error_after),
        )  # fmt: skip
        cells = "".join(f"<td>{text(number)}</td>" for number in numbers)
        rows.append(f'<tr><th>{block.block}</th>{cells}<td class="text">{text(worst)}</td></tr>')
    headings = ("block", "error before", "after", "change", "steps", "seconds", "layers only rounded", "worst layer's error")
    return section("Blocks", table((*headings, "*worst layer"), rows), kind="long")


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
    numbers = table(("block", *report.layer_names), rows)
    return f'<section class="long"><details><summary>Layers: errors as numbers</summary>{numbers}</details></section>'


def _learned(report: RunReport) -> bool:
    return any(block.error_before != block.error_after for block in report.blocks)


def _without_learning(report: RunReport) -> str:
    """What a block is before anything is learned, if the method learns at all."""
    if report.settings.get("correction_rank") is not None:
        return "rounded by GPTQ, and corrected"
    return "rounded by GPTQ" if report.settings["method"] == "gptq" else _NEAREST


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
