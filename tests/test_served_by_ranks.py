"""LRQ_TP_INVARIANT=1 in vLLM's engine: two ranks give the numbers and the tokens of one."""

from dataclasses import replace
from pathlib import Path

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from tests.checkpoints import QUICK, TINY, write_random_model
from tests.served_agreement import ON_A_CPU, agreement

pytestmark = ON_A_CPU


def test_two_ranks_that_share_outputs_alone_give_the_numbers_and_tokens_of_one(tmp_path: Path) -> None:
    # All that ranks share: a token's step, sums of groups of integers, and what a correction shrinks a token to; and experts.
    settings = QuantizeSettings("w4a8", "rtn", group_size=64, **QUICK)
    quantize_model(TINY, tmp_path / "corrected", replace(settings, correction_rank="10%"))
    quantize_model(write_random_model("mixtral", tmp_path / "float"), tmp_path / "experts", settings)
    options = ("--modes", "eager", "--layouts", "tp1", "tp2")
    made = [tmp_path / "corrected", tmp_path / "experts"]
    rows = agreement(made, tmp_path / "found.json", *options, LRQ_TP_INVARIANT="1")
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert [row["layout"] for row in (one, two)] == ["tp1", "tp2"] and one["kernels"] == two["kernels"] != ["reference"]
        assert two["as_first"] == {"tokens": 1.0, "prompts": 1.0}
        assert one["mean_difference"] == two["mean_difference"] and one["max_difference"] == two["max_difference"]
