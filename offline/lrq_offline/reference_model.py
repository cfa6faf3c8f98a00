"""The reference path: an LRQ checkpoint as a transformers model that computes exactly what its integers mean.

Plain torch in float32, activations really quantized. Every kernel and every server is tested against it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrq_offline.decoder_blocks import FAMILIES, blocks_of, empty_model, restore_constants
from lrq_offline.reference_linear import ReferenceLinear
from lrq_offline.served_precision import round_like_a_server
from lrq_offline.source_model import check_model_tensors, model_config
from lrq_vllm.checkpoint.schema import Manifest, config_without_quantization
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors, read_config

__all__ = ["load_model", "open_model"]

_CPU = torch.device("cpu")


def load_model(folder: Path, *, served_in: torch.dtype | None = None, exact_attention: bool = False) -> PreTrainedModel:
    """A transformers causal LM from a float folder or an LRQ checkpoint, on the CPU, in evaluation mode.

    It computes in float32, whatever the checkpoint's precision. With ``served_in`` it rounds where a server that runs in
    that dtype rounds (see served_precision.py, and for ``exact_attention``), for comparing the two.

    Raises ModelFolderError or CheckpointError when the folder is incomplete or inconsistent.
    """
    return open_model(folder, read_config(folder), served_in=served_in, exact_attention=exact_attention)


def open_model(
    folder: Path, raw_config: Mapping[str, Any], *, served_in: torch.dtype | None = None,
    exact_attention: bool = False, device: torch.device = _CPU, streamed: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """As :func:`load_model`, with config.json's content given, on ``device``.

    streamed: each block is read when its turn comes and forgotten after it, in every pass.
    """
    config = model_config(config_without_quantization(raw_config), folder)
    tensors = TensorFolder(folder)
    model = empty_model(config)
    if "quantization_config" in raw_config:
        manifest = Manifest.from_dict(raw_config["quantization_config"])
        check_tensors(tensors, manifest)
        _replace_linears(model, manifest)
    family = FAMILIES[config.model_type]
    names = check_model_tensors(model, tensors, config)
    if streamed:
        names = [name for name in names if not name.startswith(f"{family.blocks}.")]
    model.load_state_dict({name: _read(tensors, name, device) for name in names}, strict=False, assign=True)
    model.tie_weights()
    restore_constants(model, family, config)
    model.get_submodule(family.rotary).to(device)
    if served_in is not None:
        round_like_a_server(model, family, served_in, exact_attention)
    if streamed:
        for index, block in enumerate(blocks_of(model, family)):
            _stream(block, f"{family.blocks}.{index}", tensors, device)
    return model.requires_grad_(False)


def _stream(block: nn.Module, name: str, tensors: TensorFolder, device: torch.device) -> None:
    def read(*_: Any) -> None:
        state = {key: _read(tensors, f"{name}.{key}", device) for key in block.state_dict()}
        block.load_state_dict(state, assign=True)

    def forget(*_: Any) -> None:
        block.to("meta")

    block.register_forward_pre_hook(read)
    block.register_forward_hook(forget)


def _read(tensors: TensorFolder, name: str, device: torch.device) -> Tensor:
    """16-bit floats as float32; integers, and what the quantizers keep in float32, as they are."""
    tensor = tensors.get(name).to(device)
    return tensor.float() if tensor.is_floating_point() else tensor


def _replace_linears(model: nn.Module, manifest: Manifest) -> None:
    for module in manifest.quantized:
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(module, ReferenceLinear(manifest, module, linear.bias))
