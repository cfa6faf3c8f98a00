"""A router's outputs are not padded in a compiled model with experts, and what a user has chosen stays."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from lrq_vllm.router_compilation import keep_router_packed
from tests.vllm_layers import lrq_config, manifest_for, plugin_world

PREFIX = "model.layers.0.mlp.experts"
EXPERT = {f"{PREFIX}.0.{name}": (64, 64) for name in ("gate_proj", "up_proj", "down_proj")}


def test_the_option_is_one_of_this_torch_and_on_by_itself() -> None:
    assert inductor_config.shape_padding is True


def test_a_models_products_are_not_padded() -> None:
    config = SimpleNamespace(inductor_compile_config={})
    keep_router_packed(config)
    assert config.inductor_compile_config == {"shape_padding": False}


def test_what_the_user_has_chosen_stays() -> None:
    config = SimpleNamespace(inductor_compile_config={"shape_padding": True})
    keep_router_packed(config)
    assert config.inductor_compile_config == {"shape_padding": True}


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="one rank without a GPU")
@pytest.mark.parametrize("with_experts", [True, False])
def test_it_is_models_with_experts_that_are_compiled_so(with_experts: bool) -> None:
    from vllm.config import get_current_vllm_config

    layer: Any = torch.nn.Module()
    if with_experts:
        layer.moe_config = SimpleNamespace(tp_size=1, ep_size=1, dp_size=1, num_experts=4)
    with plugin_world():
        lrq_config(manifest_for("w4a16", EXPERT)).get_quant_method(layer, PREFIX)
        inductor = get_current_vllm_config().compilation_config.inductor_compile_config
    assert inductor.get("shape_padding") is (False if with_experts else None)
