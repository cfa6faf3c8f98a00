"""Weights that vLLM loads again while it serves, and weights that it makes up: whole models, built without an engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint import hadamard
from lrq_vllm.checkpoint.store import TensorFolder
from lrq_vllm.errors import CheckpointError, SettingsError
from lrq_vllm.vllm_world import vllm_world
from tests.checkpoints import QUICK, TINY, write_random_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="builds vLLM's layers on the CPU, which needs its CPU build"),
]

SETTINGS = {
    "w8a8": QuantizeSettings("w8a8", "rtn", **QUICK),
    "w4a8": QuantizeSettings("w4a8", "rtn", group_size=64, **QUICK),
    "w4a16": QuantizeSettings("w4a16", "rtn", correction_rank="10%", **QUICK),
}


@contextmanager
def built(folder: Path, **options: Any) -> Iterator[tuple[Any, Any]]:
    """vLLM's configuration and its model for a checkpoint, without weights."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(model=str(folder), enforce_eager=True, max_model_len=64, **options).create_engine_config()
    with torch.device("cpu"), vllm_world(config, config.model_config.dtype):
        yield config, initialize_model(config)


def stored(folder: Path, without: str = "nothing") -> Iterator[tuple[str, Tensor]]:
    tensors = TensorFolder(folder)
    return ((name, tensors.get(name)) for name in sorted(tensors) if not name.endswith(without))


def outputs(model: Any) -> dict[str, Tensor]:
    """Of each quantized linear layer, for the same inputs each time."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lrq_in_features"):
            x = torch.randn(4, layer.lrq_in_features, generator=generator).to(layer.lrq_dtype)
            found[name] = layer.quant_method.apply(layer, x, None).clone()
    return found


@contextmanager
def loaded(folder: Path) -> Iterator[tuple[Any, Any]]:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    with built(folder) as (config, model):
        record_metadata_for_reloading(model)
        model.load_weights(stored(folder))
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        yield config, model


def load_again(config: Any, model: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(tensors)
    finalize_layerwise_reload(model, config.model_config)


@pytest.mark.parametrize("scheme", SETTINGS)
def test_layers_compute_the_same_when_their_weights_come_again(scheme: str, tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "out", SETTINGS[scheme])
    with loaded(tmp_path / "out") as (config, model):
        before = outputs(model)
        load_again(config, model, stored(tmp_path / "out"))
        after = outputs(model)
    assert before.keys() == after.keys() and len(before) >= 8
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_rotations_come_back_too_where_a_sleep_has_lost_their_tables(tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "out", QuantizeSettings("w4a4", "gptq", **QUICK))
    with loaded(tmp_path / "out") as (config, model):
        before = outputs(model)
        for table in hadamard._tables.values():
            table.fill_(torch.nan)
        load_again(config, model, stored(tmp_path / "out"))
        after = outputs(model)
    assert len(hadamard._tables) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_tensor_that_does_not_come_again_is_named(tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "out", SETTINGS["w4a8"])
    missing = "layers.0.self_attn.o_proj.weight_step"
    with loaded(tmp_path / "out") as (config, model), pytest.raises(CheckpointError, match=missing):
        load_again(config, model, stored(tmp_path / "out", without=missing))


def test_experts_that_serve_are_not_loaded_again(tmp_path: Path) -> None:
    source = write_random_model("mixtral", tmp_path / "float")
    quantize_model(source, tmp_path / "out", QuantizeSettings("w4a16", "rtn", **QUICK))
    with loaded(tmp_path / "out") as (config, model), pytest.raises(SettingsError, match="cannot be loaded again"):
        load_again(config, model, stored(tmp_path / "out"))


@pytest.mark.parametrize(("family", "scheme"), [("llama", "w8a8"), ("llama", "w4a4"), ("mixtral", "w8a8")])
def test_weights_that_vllm_makes_up_are_served(family: str, scheme: str, tmp_path: Path) -> None:
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    source = write_random_model(family, tmp_path / "float")
    quantize_model(source, tmp_path / "out", QuantizeSettings(scheme, "rtn" if scheme == "w8a8" else "gptq", **QUICK))
    with built(tmp_path / "out", load_format="dummy") as (config, model):
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        assert all(torch.isfinite(y).all() for y in outputs(model).values())


def test_adapters_are_refused(tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "out", SETTINGS["w4a8"])
    with pytest.raises(SettingsError, match="--enable-lora"), built(tmp_path / "out", enable_lora=True):
        pass
