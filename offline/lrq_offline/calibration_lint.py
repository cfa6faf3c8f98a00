"""What is doubtful about calibration texts: too short, repeated, without the chat template, or also in the evaluation."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

__all__ = ["lint_texts"]

SHORT_TOKENS = 32
MOST_SHORT = 0.1  # share of the records
MOST_COPIES = 0.01  # share of the records
PASSAGE_TOKENS = 64
MOST_REPEATED = 0.1  # share of the passages
OVERLAP_CHARACTERS = 50
MOST_OVERLAP = 0.01  # share of the evaluation text

# Odd, so that no factor of a hash is lost; the golden ratio times 2^64.
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def lint_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    evaluation: Sequence[str] = (),
) -> list[str]:
    """Warnings about calibration texts (at least one), a sentence each: what is wrong, how much of it, what to do.

    samples, seq_len: windows and tokens per window that will be taken. evaluation: texts that the result will be
    measured on; those shorter than 50 characters are not looked for. An empty list means that nothing was found.
    About a second for a megabyte. Raises nothing of its own.
    """
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    return [
        *_too_short(ids, samples, seq_len),
        *_repeated(texts, ids),
        *_without_template(texts, tokenizer),
        *_in_evaluation(texts, evaluation),
    ]


def _too_short(ids: Sequence[Sequence[int]], samples: int, seq_len: int) -> Iterator[str]:
    total, short = sum(map(len, ids)), sum(len(record) < SHORT_TOKENS for record in ids)
    if total < samples * seq_len:
        yield (
            f"The calibration data has {total:,} tokens, but {samples} windows of {seq_len} need {samples * seq_len:,}: "
            "give more text, or lower --samples or --seq-len."
        )
    if short > MOST_SHORT * len(ids):
        yield (
            f"{short} of {len(ids)} calibration records ({short / len(ids):.0%}) are shorter than {SHORT_TOKENS} tokens, "
            "so that a window mixes unrelated texts: give longer records."
        )


def _repeated(texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Iterator[str]:
    """Whole records that return, then passages that return in the records that are left."""
    distinct = {key: record for text, record in zip(texts, ids, strict=True) if (key := _normalized(text))}
    written = sum(bool(text.strip()) for text in texts)
    copies = written - len(distinct)
    if copies > MOST_COPIES * written:
        yield (
            f"{copies} of {written} calibration records ({copies / written:.0%}) repeat another one apart from case and "
            "spacing: remove the copies, which add nothing and count twice."
        )
    passages = _passages([np.array(record, dtype=np.uint64) for record in distinct.values()], PASSAGE_TOKENS)
    repeated = len(passages) - len(np.unique(passages))
    if repeated > MOST_REPEATED * len(passages):
        yield (
            f"{repeated / len(passages):.0%} of the {PASSAGE_TOKENS}-token passages in the calibration data occur earlier in "
            "it, apart from whole records that do: remove near-duplicates and boilerplate."
        )


def _without_template(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    marker = _user_marker(tokenizer) if tokenizer.chat_template else ""
    if marker and not any(marker in text for text in texts):
        yield (
            f"The model has a chat template, but none of the {len(texts)} calibration records uses it: "
            'for a model that will chat, give records with "messages".'
        )


def _user_marker(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes before every message of a user, or "" if that is nothing in particular."""
    first, second = "first question", "second question"
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": second},
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template for something else than a plain chat
        return ""
    before_first, _, rest = text.removeprefix(tokenizer.bos_token or "").partition(first)
    before_second = rest.rpartition(second)[0]
    pairs = zip(reversed(before_first), reversed(before_second), strict=False)
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1].strip()


def _in_evaluation(texts: Sequence[str], evaluation: Sequence[str]) -> Iterator[str]:
    if not evaluation:
        return
    wanted = _passages([_characters(text) for text in evaluation], OVERLAP_CHARACTERS)
    known = np.sort(_passages([_characters(text) for text in texts], OVERLAP_CHARACTERS))
    # The same as np.isin(wanted, known), which would sort both together and take several times as long.
    found = (np.searchsorted(known, wanted, "left") < np.searchsorted(known, wanted, "right")).sum()
    if found > MOST_OVERLAP * len(wanted):
        yield (
            f"{found / len(wanted):.0%} of the evaluation text (passages of {OVERLAP_CHARACTERS} characters) also stands in "
            "the calibration data, which makes the result look too good: take these texts out of one of them."
        )


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _characters(text: str) -> NDArray[np.uint64]:
    """The code points of the normalized text, [characters]."""
    return np.frombuffer(_normalized(text).encode("utf-32-le"), dtype="<u4").astype(np.uint64)


def _passages(records: Sequence[NDArray[np.uint64]], width: int) -> NDArray[np.uint64]:
    """A hash of each run of ``width`` numbers that lies within one record, [passages].

    sum_j x[i + j] f^(width - 1 - j) modulo 2^64, by Horner's rule for all i at once.
    """
    numbers = np.concatenate([np.empty(0, np.uint64), *records])
    owner = np.repeat(np.arange(len(records)), np.array([len(record) for record in records], np.intp))
    count = max(len(numbers) - width + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(width):
        hashes *= _HASH_FACTOR
        hashes += numbers[offset : offset + count]
    return hashes[owner[:count] == owner[width - 1 : width - 1 + count]]
