"""The settings of a run: what is refused, and what follows from those that are accepted."""

import argparse
from typing import Any

import pytest

from lrq_offline.compute import Machine
from lrq_offline.config import METHODS, PRESETS, QuantizeSettings, default_method
from lrq_offline.settings_options import add_settings, settings_of
from lrq_vllm.checkpoint.schema import SCHEMES, WeightFormat
from lrq_vllm.errors import SettingsError

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "w5a5"}, "scheme 'w5a5'"),
    ({"method": "awq"}, "method 'awq'"),
    ({"iters": 0}, "iters is 0"),
    ({"samples": 0}, "samples is 0"),
    ({"seq_len": 1}, "seq-len is 1"),
    ({"batch_size": -2}, "batch-size is -2"),
    ({"rank": 0}, "rank is 0"),
    ({"rank": "half"}, "rank is 'half', but must be a number or full"),
    ({"seed": -1}, "seed is -1"),
    ({"learning_rate": 0.0}, "lr is 0.0"),
    ({"weight_decay": -1.0}, "weight-decay is -1.0"),
    ({"weight_decay": float("nan")}, "weight-decay is nan"),
    ({"learning_rate": 1.0}, "lr is 1.0"),
    ({"learning_rate": float("nan")}, "lr is nan"),
    ({"kv_bits": 4}, "kv-bits is 4"),
    ({"loss": "l1"}, "loss is 'l1', but must be mse or fisher"),
    ({"learn_inputs": "both"}, "learn-inputs is 'both', but must be quantized or float"),
    ({"group_size": 0}, "group-size is 0"),
    ({"group_size": -32}, "group-size is -32"),
    ({"group_size": 48}, "group-size is 48"),
    ({"scheme": "w8a8", "group_size": 32}, "group-size goes with weights of 4 bits and fewer, not with w8a8"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_SETTINGS)
def test_settings_refuse_a_bad_value_by_its_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        QuantizeSettings(**{"scheme": "w4a16", **changes})
    assert words in str(error.value)


def test_settings_name_all_problems_at_once() -> None:
    with pytest.raises(SettingsError, match=r"iters is 0.*rank is -1.*lr is 2.*kv-bits is 3.*group-size is 5"):
        QuantizeSettings("w3a16", iters=0, rank=-1, learning_rate=2, kv_bits=3, group_size=5)


CLIPPED = "w4a4"
WORKING = [
    (scheme, method)
    for scheme in SCHEMES
    for method in METHODS
    if (scheme, method) not in {(CLIPPED, "lrq"), (CLIPPED, "flexround")}
]


@pytest.mark.parametrize(("scheme", "method"), WORKING)
def test_every_scheme_and_method_has_settings_that_need_nothing_else(scheme: str, method: str) -> None:
    settings = QuantizeSettings(scheme, method)
    assert settings.weight_format == WeightFormat(int(scheme[1]), symmetric=False, group_size=None)


def test_lrq_renews_its_factors_below_8_bits_where_they_have_steps_enough() -> None:
    assert QuantizeSettings("w4a16", iters=300).renews and not QuantizeSettings("w4a16", iters=299).renews
    assert QuantizeSettings("w4a16", iters=50, renew=True).renews
    assert not QuantizeSettings("w4a16", iters=5000, renew=False).renews
    assert not QuantizeSettings("w8a8", iters=5000).renews
    for other in ({"method": "flexround"}, {"method": "gptq"}, {"rank": "full"}):
        assert not QuantizeSettings("w4a16", **other).renews  # type: ignore[arg-type]


def test_earlier_factors_fade_as_the_present_ones_decay() -> None:
    assert QuantizeSettings("w4a16").fading == pytest.approx(0.02)
    assert QuantizeSettings("w4a16", weight_decay=0.5).fading == pytest.approx(0.005)
    assert QuantizeSettings("w4a16", weight_decay=0).fading == 0


def test_blocks_learn_from_the_float_models_inputs_at_8_bits_unless_they_are_told_or_correct() -> None:
    assert all(QuantizeSettings("w8a8", method).learns_from_float for method in ("lrq", "flexround"))
    assert not any(QuantizeSettings(scheme).learns_from_float for scheme in ("w4a8", "w4a16", "w3a16"))
    assert QuantizeSettings("w4a16", learn_inputs="float").learns_from_float
    assert not QuantizeSettings("w8a8", learn_inputs="quantized").learns_from_float
    assert not QuantizeSettings("w8a8", correction_rank=8).learns_from_float
    assert not QuantizeSettings("w8a8", "gptq", learn_inputs="float").learns_from_float
    assert [QuantizeSettings(scheme).caches for scheme in ("w8a8", "w4a8")] == [3, 2]


def test_learning_weighs_errors_below_8_bits_unless_it_is_told_or_corrects() -> None:
    assert all(
        QuantizeSettings(scheme, method).weighs_errors for scheme in ("w4a8", "w3a16") for method in ("lrq", "flexround")
    )
    assert QuantizeSettings("w8a8", loss="fisher").weighs_errors and not QuantizeSettings("w8a8").weighs_errors
    assert not QuantizeSettings("w4a16", loss="mse").weighs_errors
    assert QuantizeSettings("w4a16", correction_rank=8, loss="fisher").weighs_errors
    assert not QuantizeSettings("w4a16", correction_rank=8).weighs_errors
    assert not QuantizeSettings("w4a16", "gptq", loss="fisher").weighs_errors


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_accepted(name: str) -> None:
    QuantizeSettings("w4a16", **vars(PRESETS[name]))


def test_settings_alone_learn_as_the_default_preset_says() -> None:
    settings, preset = QuantizeSettings("w4a16"), PRESETS["default"]
    assert all(getattr(settings, name) == value for name, value in vars(preset).items())


# --- corrections and rotations ---


def test_the_default_method_of_clipped_activations_is_gptq() -> None:
    assert {scheme: default_method(scheme) for scheme in SCHEMES} == dict.fromkeys(SCHEMES, "lrq") | {CLIPPED: "gptq"}


def test_models_are_rotated_for_4_bit_activations_or_when_asked() -> None:
    assert QuantizeSettings(CLIPPED, "gptq").rotates and QuantizeSettings("w4a8", "gptq", rotate=True).rotates
    assert not QuantizeSettings(CLIPPED, "gptq", rotate=False).rotates and not QuantizeSettings("w4a8", "gptq").rotates
    with pytest.raises(SettingsError, match="rotate does not go with SmoothQuant"):
        QuantizeSettings("w8a8", "gptq", rotate=True)
    with pytest.raises(SettingsError, match="hadamard-block is for rotated models"):
        QuantizeSettings("w4a8", "gptq", hadamard_block=64)


def test_the_rank_of_a_correction_is_a_number_or_a_share_of_the_smaller_side() -> None:
    ranks = {
        rank: QuantizeSettings("w4a8", "gptq", correction_rank=rank).correction_rank_of((4096, 1024))
        for rank in (7, "10%", "0.01%")
    }
    assert ranks == {7: 7, "10%": 102, "0.01%": 1}
    assert not QuantizeSettings("w4a8", "gptq").corrects


@pytest.mark.parametrize("rank", [0, -1, "0%", "110%", "ten", "-5%", "nan%"])
def test_a_rank_that_is_none_is_refused(rank: int | str) -> None:
    with pytest.raises(SettingsError, match=r"correction-rank is .* must be a number from 1 up, or a share like 10%"):
        QuantizeSettings("w4a8", "gptq", correction_rank=rank)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_correction_goes_with_every_method_and_scheme(scheme: str, method: str) -> None:
    assert QuantizeSettings(scheme, method, correction_rank="10%", rotate=False).corrects


# --- what the rate and the rank are ---


@pytest.mark.parametrize("method", ["lrq", "flexround"])
def test_a_correction_is_learned_at_a_quarter_of_the_rate_unless_a_rate_is_given(method: str) -> None:
    alone, joint = (QuantizeSettings("w4a8", method, correction_rank=rank) for rank in (None, 8))
    assert joint.rate(1024) == alone.rate(1024) / 4
    assert QuantizeSettings("w4a8", method, correction_rank=8, learning_rate=0.01).rate(1024) == 0.01


def test_learning_rates_of_lrq_grow_for_narrow_models() -> None:
    for scheme in ("w8a8", "w4a8", "w4a16", "w3a16", "w2a16"):
        assert QuantizeSettings(scheme).rate(1024) == 2 * QuantizeSettings(scheme).rate(4096) < 0.01
    assert QuantizeSettings("w4a16", "flexround").rate(1024) == QuantizeSettings("w4a16", "flexround").rate(4096) == 3e-3


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w3a16"])
def test_steps_of_groups_are_learned_at_a_tenth_of_lrqs_rate(scheme: str) -> None:
    assert QuantizeSettings(scheme, group_size=128).step_rate_share == 0.1
    assert QuantizeSettings(scheme).step_rate_share == 1
    for settings in ({"method": "flexround"}, {"rank": "full"}):
        assert QuantizeSettings(scheme, group_size=128, **settings).step_rate_share == 1


def test_the_weight_decay_is_the_methods_unless_it_is_given() -> None:
    assert QuantizeSettings("w4a16").decay > QuantizeSettings("w4a16", "flexround").decay > 0
    assert QuantizeSettings("w4a16", rank="full").decay == QuantizeSettings("w4a16", "flexround").decay
    assert [QuantizeSettings("w4a16", weight_decay=given).decay for given in (0.0, 3.0)] == [0.0, 3.0]
    assert QuantizeSettings("w4a16", "rtn", weight_decay=3.0).decay == 0


def test_lrq_at_full_rank_learns_at_flexrounds_rate() -> None:
    for width in (256, 4096):
        assert QuantizeSettings("w3a16", rank="full").rate(width) == QuantizeSettings("w3a16", "flexround").rate(width)


def test_a_rate_that_is_given_is_the_rate_at_every_width() -> None:
    for method in ("lrq", "flexround"):
        assert {QuantizeSettings("w4a16", method, learning_rate=0.02).rate(width) for width in (64, 4096)} == {0.02}


@pytest.mark.parametrize("method", ["gptq", "smoothquant-rtn", "rtn"])
def test_a_method_that_learns_nothing_has_no_rate(method: str) -> None:
    settings = QuantizeSettings("w4a16", method, learning_rate=0.02)
    assert not settings.learns and settings.rate(4096) == 0


def test_the_rank_is_a_quarter_of_the_width_unless_it_is_given() -> None:
    # LRQ, section 3: 1024 for 4096-wide models, 2048 for 8192-wide.
    assert [QuantizeSettings("w4a16").matrix_rank(width) for width in (2, 4096, 8192)] == [1, 1024, 2048]
    assert QuantizeSettings("w4a16", rank=7).matrix_rank(4096) == 7


@pytest.mark.parametrize("changes", [{"rank": "full"}, {"method": "flexround"}, {"method": "flexround", "rank": 7}], ids=str)
def test_a_full_matrix_has_no_rank(changes: dict[str, Any]) -> None:
    assert QuantizeSettings(**{"scheme": "w4a16", **changes}).matrix_rank(4096) is None


def test_smoothing_comes_first_where_activations_are_static_or_it_is_asked_for() -> None:
    smoothed = {(scheme, method) for scheme, method in WORKING if QuantizeSettings(scheme, method).smooths}
    static = {("w8a8", method) for method in METHODS if method != "rtn"}
    assert smoothed == static | {(scheme, "smoothquant-rtn") for scheme in SCHEMES}


@pytest.mark.parametrize(("changes", "said"), [({"seed": 2**40}, "must be below 2"), ({"correction_rank": "inf%"}, "like 10%")])
def test_a_number_that_overflows_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        QuantizeSettings(scheme="w4a16", **changes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method rtn --rank 8", "--rank is for method lrq, not for rtn"),
        ("--method flexround --rank 8", "--rank is for method lrq, not for flexround"),
        ("--method flexround --renew", "--renew is for method lrq"),
        ("--rank full --renew", "--renew is for the two factors of a matrix"),
        ("--method gptq --loss fisher", "--loss is for methods that learn, lrq and flexround, not for gptq"),
        ("--method gptq --learn-inputs float", "--learn-inputs is for methods that learn"),
        ("--method rtn --lr 0.1", "--lr is for methods that learn"),
        ("--method rtn --weight-decay 1", "--weight-decay is for methods that learn"),
        ("--correction-rounds 3", "--correction-rounds is for a correction"),
        ("--correction-statistics float", "--correction-statistics is for a correction"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: str, said: str) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    with pytest.raises(SettingsError, match=said):
        settings_of(parser.parse_args(["model", "--scheme", "w4a16", *options.split()]))


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_an_amount_of_memory_that_is_none_is_refused(amount: float) -> None:
    with pytest.raises(SettingsError, match="no amount of memory"):
        Machine(max_gpu_gb=amount)
