"""HTML pages taken apart."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, which tags are open at its end, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def loads_nothing(page: str) -> bool:
    """Whether a page runs nothing and refers to nothing outside itself."""
    tags = Page(page).tags
    targets = [
        str(value) for _, attributes in tags for name, value in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    return (
        not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "img", "image"}
        and bool(targets)
        and all(target.startswith(("#", "data:")) for target in targets)
        and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
        and "@import" not in page
        and "://" not in page
    )
