"""Self-contained HTML pages: nothing loaded from elsewhere, everything escaped, light and dark.

The functions return HTML. Where a parameter is said to be HTML it is taken as it is, everything else is escaped.
"""

from collections.abc import Callable, Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from lrq_vllm.checkpoint.store import replace_durably
from lrq_vllm.errors import SettingsError

__all__ = ["figure", "page", "section", "settings_list", "table", "text", "write_page"]

Scalar = str | int | float | None
_WIDE, _NARROW = 900, 380


def page(
    kind: str, title: str, heading: str, subtitle: str, tiles: Iterable[tuple[str, Scalar, str]], sections: str, footer: str,
    script: str = "",
) -> str:  # fmt: skip
    """A whole page.

    kind: what page it is, above the heading. tiles: name, value and note of each headline number. sections, footer: HTML.
    script: ours, for a page that shows what its server says; a page in a file has none, and may not ask anybody.
    """
    template = Template((files("lrq_vllm.pages") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        kind=escape(kind), title=escape(title), heading=escape(heading), subtitle=escape(subtitle),
        tiles="\n".join(
            f'<div><dt>{text(name)}</dt><dd class="value">{text(value)}</dd><dd class="note">{text(note)}</dd></div>'
            for name, value, note in tiles
        ),
        sections=sections, footer=footer,
        policy="; script-src 'unsafe-inline'; connect-src 'self'" if script else "",
        script=f"<script>\n{script}</script>\n" if script else "",
    )  # fmt: skip


def write_page(page: str, output: Path) -> None:
    """The file appears whole or not at all. Raises SettingsError if it cannot be written there."""
    if output.is_dir() or not output.parent.is_dir():
        raise SettingsError(f"{output} is a folder or lies in none. Give the name of a file in a folder that is there.")
    partial = output.with_name(f".{output.name}.partial")
    try:
        # A name that came from a file system may hold what UTF-8 has no bytes for.
        partial.write_bytes(page.encode("utf-8", "replace"))
        replace_durably(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def section(title: str, body: str, about: str = "", kind: str = "") -> str:
    """A box with a heading. body and about: HTML; kind: a class of the style sheet."""
    words = f"<p>{about}</p>" if about else ""
    return f'<section class="{kind}">\n<h2>{title}</h2>{words}\n{body}\n</section>'


def figure(picture: Callable[[int], str], title: str = "") -> str:
    """A picture drawn at two widths in CSS pixels: the style sheet shows the one that fits the window."""
    heading = f"<h3>{title}</h3>" if title else ""
    wide, narrow = (picture(width) for width in (_WIDE, _NARROW))
    return f'<figure>{heading}<div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


def table(headings: Iterable[str], rows: Iterable[str]) -> str:
    """headings: a star before one of a column of text. rows: HTML."""
    head = "".join(
        f'<th class="text">{text(heading[1:])}</th>' if heading.startswith("*") else f"<th>{text(heading)}</th>"
        for heading in headings
    )
    return (
        f'<div class="scroll"><table class="whole"><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def settings_list(settings: Mapping[str, Scalar]) -> str:
    """Names, their underscores as spaces, and values."""
    items = "".join(
        f"<div><dt>{text(name.replace('_', ' '))}</dt><dd>{text(value)}</dd></div>" for name, value in settings.items()
    )
    return f'<dl class="settings">{items}</dl>'


def text(value: Scalar) -> str:
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
