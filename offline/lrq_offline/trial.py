"""``lrq-offline try``: whether models of a config can be quantized and served, found out with a small random one."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_offline.random_model import shrunk_config, write_byte_tokenizer, write_random_model
from lrq_offline.run_manifest import manifest_of
from lrq_offline.source_model import check_float, model_config
from lrq_offline.verification import check_files, check_loading, check_serving
from lrq_vllm.checkpoint.store import read_config, read_object

__all__ = ["Trial", "try_config"]

_TEXTS, _TOKENS, _STEPS = 4, 32, 4


@dataclass(frozen=True)
class Trial:
    """Of the model at its full size: linear layers to quantize, sizes of tensor parallelism. Of the small one: vLLM's class,
    and how far its answers are from the reference path's in nats on average.
    """

    linears: int
    tensor_parallel_sizes: tuple[int, ...]
    vllm_class: str
    mean_difference: float


def try_config(path: Path, settings: QuantizeSettings, on_step: Callable[[str], None] = lambda step: None) -> Trial:
    """Quantize, load and serve a two-layer random model of a config.json (or of the folder that holds one).

    Raises ModelFolderError for a family that is not known, SettingsError for groups that do not divide or without vLLM, and
    CheckpointError if vLLM does not load or compute what was written.
    """
    raw_config = read_object(path) if path.is_file() else read_config(path)
    check_float(raw_config, path)
    config = model_config(raw_config, path)
    manifest = manifest_of(config, settings)
    with tempfile.TemporaryDirectory() as made:
        source, output = Path(made, "float"), Path(made, "quantized")
        on_step("a small random model is quantized")
        write_random_model(model_config({**raw_config, **shrunk_config(config)}, path), source)
        write_byte_tokenizer(source)
        quantize_model(source, output, replace(settings, samples=_TEXTS, seq_len=_TOKENS, iters=min(settings.iters, _STEPS)))
        check_files(output)
        on_step("vLLM loads it")
        loaded = check_loading(output)
        on_step("vLLM serves it")
        replayed = check_serving(output)
    return Trial(len(manifest.quantized), manifest.tensor_parallel_sizes, loaded.model, replayed.mean_difference)
