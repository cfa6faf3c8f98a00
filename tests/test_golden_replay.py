"""When a checkpoint's texts say nothing about a server."""

from typing import Any

import pytest
from transformers import Phi3Config

from lrq_vllm.golden_replay import why_not

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("rope", "tokens", "left_out"),
    [(LONG, 8192, True), (LONG, 4096, False), ({"rope_type": "default"}, 8192, False), (None, 8192, False)],
)
def test_texts_are_left_out_where_vllm_reads_short_ones_as_long_ones(
    rope: dict[str, Any] | None, tokens: int, left_out: bool
) -> None:
    config = Phi3Config(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=131072, original_max_position_embeddings=4096,
        **({} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}),
    )  # fmt: skip
    reason = why_not(config, tokens)
    assert (reason is not None) == left_out
    assert reason is None or "more than 4096 tokens (--max-model-len 8192)" in reason
