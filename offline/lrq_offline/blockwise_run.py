"""The passage through a model's blocks: those that are finished are restored, the others quantized. Every rank makes it.

In memory at any time: one decoder block and its learning state, and the cached hidden states of both models. Before that, if
learning weighs errors, the float model is passed through once more (output_gradients.py).
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lrq_offline.block_learning import run_block, windows_at_once
from lrq_offline.block_quantizer import BlockQuantizer, QuantizedBlock
from lrq_offline.calibration import first_block_inputs
from lrq_offline.compute import Machine, choose_device, product_dtype
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import block_family, empty_model, load_block
from lrq_offline.hidden_states import HiddenStates, HiddenStatesStore
from lrq_offline.input_rotation import InputRotation
from lrq_offline.kv_cache import quantize_kv_cache
from lrq_offline.output_gradients import OutputGradients, some_windows
from lrq_offline.output_metric import PLAIN, OutputMetric, fisher_metric
from lrq_offline.ranks import Ranks
from lrq_offline.source_model import SourceModel
from lrq_offline.stored_block import restore_block
from lrq_vllm.checkpoint.schema import Manifest

__all__ = ["BlockwiseRun", "FinishedBlock"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedBlock:
    """Block ``index`` (from 0) called ``name``, quantized. ``result`` is None if an earlier run had finished it."""

    index: int
    name: str
    block: nn.Module
    result: QuantizedBlock | None
    seconds: float


def _nothing(told: Any) -> None:
    """What the ranks do with what only one of them has to write or to tell."""


@dataclass(frozen=True)
class BlockwiseRun:
    """What every rank needs to know; it travels to their processes.

    windows: token ids of all ranks, int64 [samples, seq_len]. finished: the shards of blocks that an earlier run had finished,
    in order. folder: for hidden states that fit no memory.
    """

    source: SourceModel
    manifest: Manifest
    settings: QuantizeSettings
    machine: Machine
    windows: Tensor
    finished: list[Path]
    folder: Path

    def __call__(
        self,
        ranks: Ranks,
        on_block: Callable[[FinishedBlock], None] = _nothing,
        on_gradients: Callable[[int], None] = _nothing,
    ) -> None:
        """Take every block in turn, with this rank's share of the windows. on_gradients: told of how many windows of all ranks
        the gradients are going to be, before their pass.
        """
        device = choose_device(self.machine.device)
        model = empty_model(self.source.config)
        windows = ranks.share(self.windows)
        # Hidden states are kept in the model's own precision, which is what a server hands from block to block.
        inputs = first_block_inputs(self.source, model, windows, self.source.config.dtype or torch.bfloat16)
        arguments = _on_device(inputs.arguments, device)
        moments = None
        if self.settings.weighs_errors and len(self.finished) < len(arguments):
            rows = some_windows(len(windows), ranks.size)
            on_gradients(len(rows) * ranks.size)
            moments = self._gradient_moments(model, windows, rows, inputs.hidden, arguments, device, ranks)
        store = self._store(device)
        caches = [store.like(tuple(inputs.hidden.shape), inputs.hidden.dtype) for _ in range(self.settings.caches)]
        for cache in caches:
            cache.put(slice(None), inputs.hidden)
        for index in range(len(arguments)):
            metric = PLAIN
            if moments is not None and index >= len(self.finished):
                metric = fisher_metric(moments.get(slice(index, index + 1))[0], product_dtype(device))
            on_block(self._block(model, index, caches, arguments[index], ranks, metric))

    def _block(
        self,
        model: nn.Module,
        index: int,
        caches: list[HiddenStates],
        arguments: dict[str, Any],
        ranks: Ranks,
        metric: OutputMetric,
    ) -> FinishedBlock:
        """One block. The first two caches, the float and the quantized model's, hold its inputs before and its outputs after; a
        third keeps the float model's inputs.
        """
        started = time.monotonic()
        float_hidden, quantized_hidden, *kept = caches
        dtype = product_dtype(float_hidden.device)
        name = self.source.block_names[index]
        block, rotation = self._float_block(model, index, float_hidden.device)
        for cache in kept:
            cache.copy(float_hidden)
        at_once = windows_at_once(block)
        run_block(block, float_hidden, float_hidden, arguments, at_once, dtype)
        if self.settings.kv_bits is not None:
            quantize_kv_cache(block, self.settings.kv_bits)
        result = None
        if index < len(self.finished):
            restore_block(block, name, self.manifest, load_file(self.finished[index]), dtype)
        else:
            config = self.source.config
            quantizer = BlockQuantizer(self.settings, block_family(config, index), config, dtype, ranks)
            # Of the block alone, so that a run that goes on draws what an uninterrupted one would.
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index)
            float_inputs = kept[0] if kept else None
            result = quantizer.quantize(
                block, quantized_hidden, float_hidden, arguments, generator, float_inputs, rotation, metric
            )
        run_block(block, quantized_hidden, quantized_hidden, arguments, at_once, dtype)
        return FinishedBlock(index, name, block, result, time.monotonic() - started)

    def _float_block(self, model: nn.Module, index: int, device: torch.device) -> tuple[nn.Module, InputRotation | None]:
        """Block ``index`` of the float model, and what rotates inputs in it."""
        name = self.source.block_names[index]
        # 16-bit weights stay as they are where products are 16-bit, unless something is going to change them.
        as_stored = product_dtype(device) == torch.bfloat16 and not self.settings.changes_weights
        block = load_block(model, name, self.source.read, None if as_stored else torch.float32, device)
        rotation = InputRotation.of(self.manifest, name)
        if rotation is not None:
            rotation.install(block)
        return block, rotation

    def _store(self, device: torch.device) -> HiddenStatesStore:
        return HiddenStatesStore(device, self.machine.cache_bytes(device), self.folder)

    def _gradient_moments(
        self,
        model: nn.Module,
        windows: Tensor,
        rows: Tensor,
        hidden: Tensor,
        arguments: list[dict[str, Any]],
        device: torch.device,
        ranks: Ranks,
    ) -> HiddenStates:
        """Of the outputs of all blocks, by ``rows`` of this rank's windows and of what the first block receives for them."""
        gradients = OutputGradients(
            model, self.source.family, lambda index: self._float_block(model, index, device)[0], self.source.read_tied,
            self._store(device), product_dtype(device), ranks,
        )  # fmt: skip
        # Of the window alone, so that several ranks draw what one would.
        seeds = [self.settings.seed * 1_000_003 + row * ranks.size + ranks.rank for row in rows.tolist()]
        started, width = time.monotonic(), hidden.shape[-1]
        # One after the other is read, once: not worth a GPU's memory.
        moments = HiddenStatesStore(device, 0, self.folder).like((len(arguments), width, width), torch.float32)
        gradients.moments(windows[rows], hidden[rows], arguments, seeds, moments)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is free decides where the blocks' caches go
        logger.info("Fisher information of %d blocks in %.1f s", len(arguments), time.monotonic() - started)
        return moments


def _on_device(arguments: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Each block's arguments with their tensors on ``device``; one that several blocks share is there once."""
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(item) for item in value)
        return moved.setdefault(id(value), value.to(device)) if isinstance(value, Tensor) else value

    return [{key: move(value) for key, value in of_block.items()} for of_block in arguments]
