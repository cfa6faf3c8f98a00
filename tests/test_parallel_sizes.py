"""On how many GPUs a checkpoint can be served: written down when it is made, and held to when it is loaded."""

from typing import Any

import pytest
from transformers import AutoConfig

from lrq_offline.decoder_blocks import FAMILIES
from lrq_offline.parallel_sizes import tensor_parallel_sizes
from lrq_vllm.checkpoint.schema import SCHEMES, WeightFormat

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


def sizes_of(model_type: str, shape: dict[str, Any], scheme: str, group_size: int | None = None) -> tuple[int, ...]:
    config = AutoConfig.for_model(model_type, **shape)
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    inputs = {"o_proj": shape["num_attention_heads"] * shape["head_dim"], "down_proj": wide}
    quantized = {
        f"model.layers.0.{name}": (hidden, inputs.get(name.split(".")[1], hidden)) for name in FAMILIES[model_type].linears
    }
    return tensor_parallel_sizes(config, WeightFormat(SCHEMES[scheme].weight_bits, group_size=group_size), quantized)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "phi3"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w3a16"])
def test_a_model_of_usual_sizes_serves_on_every_power_of_two(model_type: str, scheme: str) -> None:
    assert sizes_of(model_type, LLAMA_3_8B, scheme) == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("changes", "scheme", "group_size", "expected"),
    [
        ({}, "w4a16", 128, (1, 2, 4, 8, 16)),  # 14336 / 128 = 112 groups, no multiple of 32
        ({"intermediate_size": 11008}, "w3a16", None, (1, 2, 4, 8)),  # 344 times 32 inputs
        ({"intermediate_size": 11008}, "w4a16", 128, (1, 2)),  # 86 groups
        ({"intermediate_size": 11008}, "w8a8", None, (1, 2, 4, 8, 16, 32)),
        (
            {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "vocab_size": 28 * 64},
            "w8a8",
            None,
            (1, 2, 4, 28),
        ),
        # Of a vocabulary of 152,064 nobody has a twenty-eighth.
        (
            {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "vocab_size": 152064},
            "w8a8",
            None,
            (1, 2, 4),
        ),
        (
            {
                "num_attention_heads": 24,
                "num_key_value_heads": 6,
                "hidden_size": 3072,
                "intermediate_size": 9216,
                "vocab_size": 24 * 64 - 1,
            },
            "w8a8",
            None,
            (1, 2, 3, 6, 12, 24),
        ),
    ],
)
def test_heads_groups_and_packed_words_limit_the_sizes(
    changes: dict[str, Any], scheme: str, group_size: int | None, expected: tuple[int, ...]
) -> None:
    assert sizes_of("llama", {**LLAMA_3_8B, **changes}, scheme, group_size) == expected


def test_a_norm_of_all_keys_needs_a_rank_for_each_of_their_heads_at_most() -> None:
    assert sizes_of("llama", LLAMA_3_8B, "w8a8")[-1] == 32
    assert sizes_of("olmo2", LLAMA_3_8B, "w8a8") == (1, 2, 4, 8)
