"""Compiled CPU models are told to round where vLLM's operations do, and what a user has chosen stays."""

from types import SimpleNamespace

import pytest

from lrq_vllm.cpu_compilation import round_where_operations_do


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


def test_changing_it_twice_changes_nothing_more() -> None:
    config = changed(["none"])
    round_where_operations_do(config)
    assert config.custom_ops == ["all"]
