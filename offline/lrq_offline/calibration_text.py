"""Where calibration and evaluation texts come from: a .jsonl of texts or chats, a plain text, or a named dataset."""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lrq_vllm.errors import CalibrationDataError

__all__ = ["read_texts", "shipped_calibration"]

# A dataset is streamed; more records than this are not read.
_MOST_RECORDS = 4096
_DATASET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?")
# What ends like this is a file that is missing, never a dataset to look up on the network.
_FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".text", ".md", ".csv", ".parquet")
_RECORD = 'Give each record a "text", or "messages": a list of {"role": ..., "content": ...}, all of them strings.'


def shipped_calibration() -> Path:
    """The calibration text that comes with lrq (public domain, see NOTICE): 64 records of 3,000 characters."""
    return Path(str(files("lrq_offline") / "data" / "calibration.jsonl"))


def read_texts(source: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The texts of a file or of a dataset on the Hugging Face Hub, at least one of them not blank.

    - ``texts.jsonl``: a record in each line. Its ``text`` is taken as it stands; without one, its chat ``messages``
      become text by the tokenizer's chat template (so they need a tokenizer that has one).
    - any other file: the whole of it, as one text.
    - ``org/name``, ``org/name:config`` or ``org/name:config:split``, where no such file exists: the first 4096 records
      of the dataset, like lines of a .jsonl. The split is "train" unless named (``org/name::test`` for the default
      config). Needs the package ``datasets``; nothing else here uses the network.

    The tokenizer's own first token is not repeated in chats: tokenizing a returned text as usual gives it once.
    Raises CalibrationDataError, naming the line or record, if the source cannot be read or holds no text.
    """
    path = Path(source)
    if not path.exists():
        records = enumerate(_dataset_records(str(source)), start=1)
        texts = [_text(record, f"{source}, record {number}", tokenizer) for number, record in records]
    elif path.suffix.lower() == ".json":
        raise CalibrationDataError(f"{path} is one JSON document. Write its records into a .jsonl, a line each. {_RECORD}")
    elif path.suffix.lower() == ".jsonl":
        texts = [_text(record, where, tokenizer) for where, record in _jsonl_records(path)]
    else:
        texts = [_content(path)]
    if not any(text.strip() for text in texts):
        raise CalibrationDataError(f"{source} holds no text. {_RECORD} Or give a plain text file.")
    return texts


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationDataError(f"{path} cannot be read as text ({error}). Give a .jsonl or a plain UTF-8 file.") from error


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's place, to be named in messages, and what it holds."""
    # Not splitlines: JSON allows other line separators, as U+2028, inside a string.
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationDataError(f"{where}: not a JSON object ({error}). {_RECORD}") from error
        yield where, record


def _dataset_records(source: str) -> list[Any]:
    """The first records of the dataset that ``source`` names."""
    named = _DATASET.fullmatch(source)
    if named is None or source.endswith(_FILE_SUFFIXES):
        raise CalibrationDataError(
            f"{source} is neither a file nor the name of a dataset (org/name, org/name:config or org/name:config:split). "
            "Check the path."
        )
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise CalibrationDataError(
            f"{source} is not a file, and to read it as a dataset the package datasets is missing. "
            "Check the path, or install it: pip install 'datasets>=3'."
        ) from error
    name, config, split = named["name"], named["config"] or None, named["split"] or "train"
    try:
        # From version 3 on, datasets runs no code of a dataset's repository unless it is told to.
        return list(islice(datasets.load_dataset(name, config, split=split, streaming=True), _MOST_RECORDS))
    except Exception as error:  # datasets raises its own, the Hub's, and those of several network libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CalibrationDataError(
            f"{source} is not a file, and reading it as the dataset {name} (config {config or 'default'}, split {split}) "
            f"failed: {reason}. Check the path or the dataset's name, config and split, and the network."
        ) from error


def _text(record: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    match record:
        case {"text": str(text)}:
            pass
        case {"messages": [_, *_] as messages} if all(map(_is_message, messages)):
            text = _from_messages(messages, where, tokenizer)
        case {"messages": [*_]}:
            raise CalibrationDataError(f'{where}: "messages" is empty or holds other things than role and content. {_RECORD}')
        case dict():
            keys = ", ".join(map(str, record)) or "no keys"
            raise CalibrationDataError(f'{where}: neither a "text" nor a list of "messages" (found: {keys}). {_RECORD}')
        case _:
            raise CalibrationDataError(f"{where}: not a JSON object. {_RECORD}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d in JSON: no tokenizer takes it
        raise CalibrationDataError(f"{where}: not valid Unicode ({error}). Remove or repair this record.") from error
    return text


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _from_messages(messages: list[dict[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise CalibrationDataError(
            f'{where}: "messages" need a chat template, and the model\'s tokenizer has none. '
            'Use a model with a chat template, or give each record a "text".'
        )
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like, as for roles that do not alternate
        reason = " ".join(str(error).split())[:300]
        raise CalibrationDataError(
            f"{where}: the model's chat template refuses these messages ({reason}). Change or remove this record."
        ) from error
    # Where the tokenizer itself begins every text with this token, the template's would be a second one.
    begins_texts = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins_texts else text
