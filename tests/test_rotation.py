"""Rotations: a rotated model is the same model, and what cannot be rotated is refused with the way out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from lrq_offline.cli import main
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES, blocks_of, empty_model, restore_constants
from lrq_offline.input_rotation import InputRotation
from lrq_offline.pipeline import open_source, quantize_model
from lrq_offline.reference_model import load_model
from lrq_offline.rotation import rotation_of
from lrq_offline.run_manifest import manifest_of
from lrq_offline.source_model import SourceModel
from lrq_vllm.checkpoint.store import TensorFolder, read_config, read_manifest
from lrq_vllm.errors import SettingsError
from tests.checkpoints import QUICK, TINY, write_random_model


def float32_model(source: SourceModel, settings: QuantizeSettings) -> torch.nn.Module:
    """What ``source`` reads as, in float32, with the rotations that are left to a server."""
    model = empty_model(source.config)
    state = {name: source.read(name).float() for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    restore_constants(model, source.family, source.config)
    manifest = manifest_of(source.config, settings)
    for index, block in enumerate(blocks_of(model, source.family)):
        rotation = InputRotation.of(manifest, f"{source.family.blocks}.{index}")
        if rotation is not None:
            rotation.install(block)
    return model


@torch.inference_mode()
def logits(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(5, 69).view(2, 32)
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def in_float32(folder: Path, model: Path) -> Path:
    """A copy of a model whose tensors are float32, so that nothing is rounded on the way."""
    tensors = TensorFolder(model)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def varied(name: str) -> Tensor:
        """Gains and biases of their own: those of a random model are all 1 and 0."""
        tensor = tensors.get(name).float()
        if tensor.dim() == 1:
            tensor = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        return tensor

    save_file({name: varied(name) for name in tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_config(model) | {"dtype": "float32"}))
    return folder


@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("model_type", ["tiny", "phi3", "qwen2", "qwen3"])
def test_a_rotated_model_computes_what_the_model_did(model_type: str, block: int | None, tmp_path: Path) -> None:
    stored = TINY if model_type == "tiny" else write_random_model(model_type, tmp_path / "stored")
    folder = in_float32(tmp_path / "float32", stored)
    rotated = QuantizeSettings("w4a16", "rtn", rotate=True, hadamard_block=block)
    before = logits(load_model(folder))
    after = logits(float32_model(open_source(folder, rotated), rotated))
    assert (after - before).abs().max() <= 1e-4 * max(before.abs().max().item(), 1.0)


def test_a_rotation_spreads_a_channel_over_all_and_follows_the_seed() -> None:
    source = SourceModel.open(TINY)
    first, again, other = (rotation_of(source.config, source.family, seed) for seed in (0, 0, 1))
    one = torch.zeros(1, 256)
    one[0, 3] = 16.0
    torch.testing.assert_close(first.reads_stream(one).abs(), torch.ones(1, 256))
    assert torch.equal(first.signs, again.signs) and not torch.equal(first.signs, other.signs)


def test_a_rotated_checkpoint_says_what_is_left_to_do_and_has_an_output_head_of_its_own(tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "out", QuantizeSettings("w4a16", "rtn", rotate=True, **QUICK))
    config, manifest, tensors = read_config(tmp_path / "out"), read_manifest(tmp_path / "out"), TensorFolder(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert tensors.spec("lm_head.weight") == tensors.spec("model.embed_tokens.weight")
    assert manifest.online_hadamard is not None
    assert manifest.online_hadamard.modules == tuple(f"model.layers.{index}.mlp.down_proj" for index in range(4))
    assert (manifest.online_hadamard.block, manifest.online_hadamard.order) == (768, 12)
    assert manifest.tensor_parallel_sizes == (1,)
    assert (tensors.get("model.layers.1.input_layernorm.weight") == 1).all()
    assert (tensors.get("model.norm.weight") == 1).all()


def test_8_bit_weights_of_a_rotated_model_are_as_good_as_those_of_the_model(tmp_path: Path) -> None:
    # Its own answers, through the reference path: a rotation that the two halves do not share costs whole nats.
    source = load_model(TINY)
    losses = []
    for rotate in (False, True):
        output = tmp_path / str(rotate)
        quantize_model(TINY, output, QuantizeSettings("w8a8", "rtn", rotate=rotate, **QUICK))
        log_p, log_q = (logits(model).log_softmax(-1) for model in (source, load_model(output)))
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    assert losses[1] < 1.5 * losses[0] < 0.5


def test_smaller_blocks_before_down_proj_leave_room_for_tensor_parallelism() -> None:
    source = SourceModel.open(TINY)
    manifest = manifest_of(source.config, QuantizeSettings("w4a4", "gptq", hadamard_block=192))
    assert manifest.tensor_parallel_sizes == (1, 2, 4)
    assert manifest.online_hadamard is not None and manifest.online_hadamard.order == 12


@pytest.mark.parametrize(
    ("model_type", "shape", "words"),
    [
        ("olmo2", {}, "norms stand between its layers and the residual stream"),
        ("gemma2", {"head_dim": 32}, "norms stand between its layers and the residual stream"),
        ("llama", {"intermediate_size": 11008}, "no Hadamard matrix is known for intermediate_size 11008"),
        ("llama", {"hidden_size": 4 * 22}, "no Hadamard matrix is known for the size of a head 22"),
        ("mixtral", {}, "it has experts"),
    ],
)
def test_a_model_that_cannot_be_rotated_is_refused(model_type: str, shape: dict[str, Any], words: str) -> None:
    config = AutoConfig.for_model(
        model_type, **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128} | shape
    )
    with pytest.raises(SettingsError, match=f"{words}.*--no-rotate"):
        rotation_of(config, FAMILIES[config.model_type], 0)


def test_a_refused_rotation_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_random_model("olmo2", tmp_path / "model")
    assert main(["quantize", str(model), "-o", str(tmp_path / "out"), "--scheme", "w4a4", "--samples", "2"]) == 2
    assert "--no-rotate" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
