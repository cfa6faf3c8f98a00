"""Compiled CPU models are told to round where vLLM's operations do, and what a user has chosen stays."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch._inductor import config as inductor_config

from lrq_vllm.cpu_compilation import round_where_operations_do


@pytest.fixture(autouse=True)
def torchs_defaults() -> Iterator[None]:
    """As torch comes, and so again after each test."""
    with inductor_config.patch(emulate_precision_casts=False):
        yield


def changed(custom_ops: list[str], **inductor: bool) -> SimpleNamespace:
    config = SimpleNamespace(custom_ops=custom_ops, inductor_compile_config=inductor)
    round_where_operations_do(config)
    return config


def test_vllms_default_becomes_its_own_operations_with_their_roundings() -> None:
    config = changed(["none"])
    assert config.custom_ops == ["all"]
    assert config.inductor_compile_config == {"emulate_precision_casts": True}


@pytest.mark.parametrize("chosen", [["all"], ["none", "+rms_norm"], ["all", "-silu_and_mul"]], ids=str)
def test_operations_that_the_user_has_chosen_stay(chosen: list[str]) -> None:
    assert changed(list(chosen)).custom_ops == chosen


def test_a_setting_of_inductor_that_the_user_has_chosen_stays() -> None:
    assert changed(["none"], emulate_precision_casts=False).inductor_compile_config == {"emulate_precision_casts": False}


@pytest.mark.parametrize("chosen", [{}, {"emulate_precision_casts": False}], ids=str)
def test_a_model_that_has_read_its_options_finds_the_same_in_torchs_defaults(chosen: dict[str, bool]) -> None:
    wanted = changed(["none"], **chosen).inductor_compile_config["emulate_precision_casts"]
    assert inductor_config.emulate_precision_casts is wanted


def test_changing_it_twice_changes_nothing_more() -> None:
    config = changed(["none"])
    round_where_operations_do(config)
    assert config.custom_ops == ["all"]
