#!/usr/bin/env python3
"""Write texts for bench/quality.py: to calibrate on (with code), held-out code and foreign text, and texts to choose by.

    python bench/quality_texts.py calibration.jsonl --foreign udhr/data/udhr --out texts

calibration.jsonl: records of docs and prose. Code is the modules of Python's standard library; foreign text the Universal
Declaration of Human Rights, as its XML files (udhr_deu_1996.xml ...) have it. The languages, modules and records to choose by
(validation*.jsonl) are in no other text; no setting is chosen by what is evaluated on.
"""

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

EVALUATED = ("deu_1996", "fra", "ita", "spa", "nld", "por_PT")
CHOSEN_BY = ("swe", "cat", "ron_2006", "dan")
RECORD, LONG_RECORD = 3000, 20000  # characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--foreign", type=Path, required=True, help="folder of XML files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    records = [json.loads(line)["text"] for line in arguments.calibration.read_text().splitlines()]
    learned_from = [text for index, text in enumerate(records) if index % 8]
    modules = standard_library()
    random.Random(0).shuffle(modules)
    code = len(learned_from) // 2
    texts = {
        "calibration": mixed(learned_from, [text[:RECORD] for text in modules[:code]]),
        "code": (text[:LONG_RECORD] for text in modules[code : code + 24]),
        "foreign": (declaration(arguments.foreign, language) for language in EVALUATED),
        "validation": records[::8],
        "validation-code": (text[:LONG_RECORD] for text in modules[code + 24 : code + 48]),
        "validation-foreign": (declaration(arguments.foreign, language) for language in CHOSEN_BY),
    }
    arguments.out.mkdir(parents=True)
    for name, of_name in texts.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in of_name]
        (arguments.out / f"{name}.jsonl").write_text("".join(lines))


def standard_library() -> list[str]:
    """Modules that fill a record."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    own = [path for path in paths if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts)]
    return [text for path in own if len(text := path.read_text(errors="ignore")) >= RECORD]


def mixed(two_of: list[str], one_of: list[str]) -> Iterable[str]:
    """Two of one and one of the other in turn."""
    for index, text in enumerate(one_of):
        yield from two_of[2 * index : 2 * index + 2]
        yield text


def declaration(folder: Path, language: str) -> str:
    """Its titles and paragraphs."""
    tree = ElementTree.parse(folder / f"udhr_{language}.xml")
    return "\n".join(text.strip() for text in tree.getroot().itertext() if text.strip())


if __name__ == "__main__":
    main()
