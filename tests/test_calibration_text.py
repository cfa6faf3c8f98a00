"""Texts for calibration: what each kind of source gives, what is refused and how, and what the lint warns of."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lrq_offline.calibration import token_windows
from lrq_offline.calibration_lint import lint_texts
from lrq_offline.calibration_text import read_texts, shipped_calibration
from lrq_offline.source_model import load_tokenizer
from lrq_vllm.errors import CalibrationDataError
from tests.checkpoints import HELDOUT, TINY

# Like many: the first token, a line with the role, the content, an end token. System messages are refused.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
CHAT_TEXT = "<|user|>\nWhy?<|end_of_text|>\n<|assistant|>\nBecause.<|end_of_text|>\n"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's, which has no chat template and begins every text with <|begin_of_text|>."""
    return load_tokenizer(TINY)


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(folder: Path, *records: Any) -> Path:
    """A file with a line for each record; a str is a line as it stands."""
    path = folder / "texts.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def refusal(source: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The message that reading ``source`` ends with: one paragraph."""
    with pytest.raises(CalibrationDataError) as raised:
        read_texts(source, tokenizer)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Files


def test_a_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    assert read_texts(jsonl(tmp_path, {"text": "one"}, "", {"text": "two\nlines", "id": 7})) == ["one", "two\nlines"]


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    assert read_texts(str(jsonl(tmp_path, {"text": "one"}))) == ["one"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    assert read_texts(jsonl(tmp_path, '{"text": "one\u2028two\x85three"}')) == ["one\u2028two\x85three"]


def test_any_other_file_is_one_text_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text('\ufeff{"text": "as it stands"}\nand on', encoding="utf-8")
    assert read_texts(path) == ['{"text": "as it stands"}\nand on']


def test_the_shipped_calibration_has_64_records() -> None:
    assert [len(text) for text in read_texts(shipped_calibration())] == [3000] * 64


def test_messages_and_texts_may_be_mixed(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path, {"text": "one"}, {"messages": CHAT}, {"text": None, "messages": CHAT})
    assert read_texts(path, chat_tokenizer) == ["one", CHAT_TEXT, CHAT_TEXT]


def test_a_text_beside_messages_is_taken_as_it_stands(tmp_path: Path) -> None:
    assert read_texts(jsonl(tmp_path, {"messages": CHAT, "text": "one"})) == ["one"]


def test_a_chat_begins_with_one_first_token(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = read_texts(jsonl(tmp_path, {"messages": CHAT * 20}), chat_tokenizer)
    window = token_windows(chat_tokenizer, texts, 1, 32)[0].tolist()
    assert window.count(chat_tokenizer.bos_token_id) == 1


def test_a_first_token_that_only_the_template_writes_is_kept(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.bos_token = "<|end_of_text|>"  # not the one that this tokenizer puts in front
    assert read_texts(jsonl(tmp_path, {"messages": CHAT}), chat_tokenizer) == ["<|end_of_text|>" + CHAT_TEXT]


def test_a_tokenizer_without_a_first_token_leaves_chats_as_the_template_writes_them(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    chat_tokenizer.bos_token = None
    assert read_texts(jsonl(tmp_path, {"messages": CHAT}), chat_tokenizer) == [CHAT_TEXT]


# Files that are refused


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "3", "{}", '{"text": 3}', '{"messages": "hello"}', '{"prompt": "a"}'])
def test_a_malformed_line_is_refused_by_number(tmp_path: Path, line: str) -> None:
    message = refusal(jsonl(tmp_path, {"text": "one"}, "", line))
    assert "texts.jsonl, line 3: " in message and '"messages"' in message


def test_a_line_without_text_is_refused_by_what_it_has(tmp_path: Path) -> None:
    assert "found: prompt, answer" in refusal(jsonl(tmp_path, {"prompt": "a", "answer": "b"}))


@pytest.mark.parametrize("messages", [[], ["hello"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_malformed_messages_are_refused(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, messages: list[object]
) -> None:
    assert 'line 1: "messages" is empty or holds' in refusal(jsonl(tmp_path, {"messages": messages}), chat_tokenizer)


def test_messages_without_a_chat_template_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path, {"messages": CHAT})
    for given in (tokenizer, None):
        message = refusal(path, given)
        assert "line 1" in message and "Use a model with a chat template" in message and '"text"' in message


def test_messages_that_the_template_refuses_are_refused_by_number(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = jsonl(tmp_path, {"messages": CHAT}, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]})
    message = refusal(path, chat_tokenizer)
    assert "line 2" in message and "no system messages" in message


def test_half_a_surrogate_pair_is_refused_by_number(tmp_path: Path) -> None:
    assert "line 1: not valid Unicode" in refusal(jsonl(tmp_path, r'{"text": "\ud83d"}'))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "cannot be read as text" in refusal(tmp_path / "latin.txt")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read as text" in refusal(tmp_path)


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    assert "holds no text" in refusal(jsonl(tmp_path, {"text": " \n"}))
    (tmp_path / "empty.txt").touch()
    assert "holds no text" in refusal(tmp_path / "empty.txt")


# Datasets


class FakeHub:
    """Stands in for the module ``datasets``: remembers what was asked, and streams the records it holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self.records: Iterator[object] = iter(())
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=self.load_dataset))  # type: ignore[arg-type]

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[object]:
        assert streaming
        self.asked.append((name, config, split))
        return self.records


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    return FakeHub(monkeypatch)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:config", ("org/name", "config", "train")),
        ("org/name:config:test", ("org/name", "config", "test")),
        ("org/name-1.5::test", ("org/name-1.5", None, "test")),
        (Path("org/name"), ("org/name", None, "train")),
    ],
)
def test_a_dataset_is_named_with_config_and_split(hub: FakeHub, source: Path | str, asked: tuple[str, str | None, str]) -> None:
    hub.records = iter([{"text": "one", "url": "x"}, {"text": "two", "url": "y"}])
    assert read_texts(source) == ["one", "two"]
    assert hub.asked == [asked]


def test_a_dataset_may_hold_messages(hub: FakeHub, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    hub.records = iter([{"messages": CHAT, "text": None}])
    assert read_texts("org/name", chat_tokenizer) == [CHAT_TEXT]


def test_only_the_first_records_of_a_dataset_are_read(hub: FakeHub) -> None:
    hub.records = ({"text": str(number)} for number in range(1_000_000))
    assert read_texts("org/name") == [str(number) for number in range(4096)]
    assert next(hub.records) == {"text": "4096"}


def test_a_file_comes_before_a_dataset_of_that_name(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("local")
    assert read_texts("org/name") == ["local"]
    assert hub.asked == []


@pytest.mark.parametrize(
    "source", ["absent", "./absent", "../org/name", "/org/name", "org/name/more", "data/texts.jsonl", "org/name:a:b:c"]
)
def test_an_absent_path_is_neither_file_nor_dataset(hub: FakeHub, source: str) -> None:
    assert f"{source} is neither a file nor the name of a dataset" in refusal(source)
    assert hub.asked == []


def test_a_dataset_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    message = refusal("org/name")
    assert "org/name is not a file" in message and "pip install 'datasets" in message


def test_a_dataset_without_the_columns_is_refused_by_those_it_has(hub: FakeHub) -> None:
    hub.records = iter([{"prompt": "a", "answer": "b"}])
    message = refusal("org/name")
    assert "org/name, record 1: " in message and "found: prompt, answer" in message


def test_an_empty_dataset_is_refused(hub: FakeHub) -> None:
    assert "org/name holds no text" in refusal("org/name")


@pytest.mark.parametrize(("error", "reason"), [(ConnectionError("no\nroute"), "no route"), (TimeoutError(), "TimeoutError")])
def test_a_download_that_fails_is_refused_with_its_reason(hub: FakeHub, error: Exception, reason: str) -> None:
    def stream() -> Iterator[object]:
        yield {"text": "one"}
        raise error

    hub.records = stream()
    message = refusal("org/name:en")
    assert f"dataset org/name (config en, split train) failed: {reason}" in message


# Lint


def prose(seed: int, words: int) -> str:
    """Words that are letters at random: no two passages agree."""
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghijklmnop", k=6)) for _ in range(words))


def lint(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[str]:
    """The warnings, for two windows of 64 tokens; each is one sentence."""
    warnings = lint_texts(texts, tokenizer, **{"samples": 2, "seq_len": 64, **options})
    assert all(warning.endswith(".") and ". " not in warning for warning in warnings)
    return warnings


RECORDS = [prose(seed, 100) for seed in range(20)]


def test_good_data_gives_no_warning(tokenizer: PreTrainedTokenizerBase) -> None:
    assert lint(RECORDS, tokenizer, evaluation=[prose(99, 100)]) == []


def test_the_shipped_calibration_gives_no_warning(tokenizer: PreTrainedTokenizerBase) -> None:
    texts, evaluation = read_texts(shipped_calibration()), read_texts(HELDOUT)
    assert lint(texts, tokenizer, samples=64, seq_len=512, evaluation=evaluation) == []


def test_lint_warns_of_too_few_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = len(tokenizer(RECORDS[0])["input_ids"])
    (warning,) = lint(RECORDS[:1], tokenizer, samples=20)
    assert f"has {tokens:,} tokens, but 20 windows of 64 need 1,280" in warning
    assert "--samples" in warning


def test_too_few_tokens_for_the_lint_are_too_few_for_the_windows(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = len(tokenizer(RECORDS[0])["input_ids"])
    assert lint(RECORDS[:1], tokenizer, samples=1, seq_len=tokens) == []
    assert token_windows(tokenizer, RECORDS[:1], 1, tokens).shape == (1, tokens)
    assert lint(RECORDS[:1], tokenizer, samples=1, seq_len=tokens + 1) != []
    with pytest.raises(CalibrationDataError):
        token_windows(tokenizer, RECORDS[:1], 1, tokens + 1)


def test_lint_warns_of_many_short_records(tokenizer: PreTrainedTokenizerBase) -> None:
    short = [f"Number {number}." for number in range(5)]
    (warning,) = lint([*RECORDS, *short], tokenizer)
    assert "5 of 25 calibration records (20%) are shorter than 32 tokens" in warning
    assert lint([*RECORDS, *short[:2]], tokenizer) == []


def test_lint_warns_of_records_that_differ_in_case_and_spacing_only(tokenizer: PreTrainedTokenizerBase) -> None:
    (warning,) = lint([*RECORDS, RECORDS[0].upper(), RECORDS[1].replace(" ", "\n ")], tokenizer)
    assert "2 of 22 calibration records (9%) repeat another one" in warning


def test_lint_warns_of_passages_that_return(tokenizer: PreTrainedTokenizerBase) -> None:
    # Every record once more with another end: all but the last 63 of its passages return.
    again = [f"{text} {prose(1000 + number, 2)}" for number, text in enumerate(RECORDS)]
    (warning,) = lint([*RECORDS, *again], tokenizer)
    share = int(warning.partition("%")[0])
    assert 40 <= share <= 50
    assert "64-token passages" in warning


def test_passages_do_not_reach_across_records(tokenizer: PreTrainedTokenizerBase) -> None:
    # The same two short records in turn would repeat as one text; each alone is shorter than a passage.
    texts = [f"{prose(0, 8)} {number}" for number in range(30)]
    assert all(32 <= len(record) < 64 for record in tokenizer(texts)["input_ids"])
    assert lint(texts, tokenizer) == []


def test_lint_warns_of_data_without_the_chat_template(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (warning,) = lint(RECORDS, chat_tokenizer)
    assert "has a chat template, but none of the 20 calibration records uses it" in warning
    chat = read_texts(jsonl(tmp_path, {"messages": [{"role": "user", "content": prose(50, 100)}]}), chat_tokenizer)
    assert lint([*RECORDS, *chat], chat_tokenizer) == []


@pytest.mark.parametrize(
    "template",
    [
        # As Qwen's: a system message is put in front if there is none.
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        # As Llama 2's: an instruction in brackets, each with a first token.
        "{% for m in messages %}{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}{{ bos_token }}[INST] "
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        # As Llama 3's: headers, and the first token in front of them.
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}",
    ],
)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_one_chat_in_the_template_is_recognized(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str, system: list[dict[str, str]]
) -> None:
    tokenizer.chat_template = template
    assert "chat template" in lint(RECORDS, tokenizer)[0]
    messages = [*system, {"role": "user", "content": prose(50, 100)}]
    assert lint([*RECORDS, *read_texts(jsonl(tmp_path, {"messages": messages}), tokenizer)], tokenizer) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not for chats') }}",
        "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
        "constant",
    ],
)
def test_a_template_that_marks_no_user_gives_no_warning(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    assert lint(RECORDS, tokenizer) == []


def test_lint_warns_of_evaluation_text_in_the_calibration(tokenizer: PreTrainedTokenizerBase) -> None:
    evaluation = [prose(99, 300), RECORDS[3].upper().replace(" ", "  ")]
    (warning,) = lint(RECORDS, tokenizer, evaluation=evaluation)
    # 699 of these characters are known, 2099 are not: 650 and 2050 passages of 50.
    assert warning.startswith("24% of the evaluation text")
    assert "take these texts out" in warning


def test_evaluation_texts_shorter_than_a_passage_are_passed_over(tokenizer: PreTrainedTokenizerBase) -> None:
    assert lint(RECORDS, tokenizer, evaluation=["Short.", ""]) == []


def test_a_blank_record_is_short_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    (warning,) = lint([" "], tokenizer, samples=1, seq_len=1)
    assert "1 of 1 calibration records (100%) are shorter" in warning
