"""What a server finds out about what it serves, and about the counting of clipped values."""

import json
import logging.config
import os
from pathlib import Path

import pytest
import torch

from lrq_server.json_logs import json_logs, logging_config
from lrq_server.server_info import ServedModel, quality_of, server_info
from lrq_vllm.checkpoint.report import REPORT_NAME
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.golden_replay import Replayed
from lrq_vllm.worker_extension import LrqWorkerExtension
from tests.checkpoints import Checkpoints

SERVED = ServedModel(("tiny",), "0.32.0", 512, 2, "fp8", {"layers.0.up": "onednn"})


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Checkpoints) -> Path:
    return checkpoints("w8a8", "lrq")


def test_info_holds_what_is_served_and_how_good_it_is(checkpoint: Path) -> None:
    manifest, report = read_manifest(checkpoint), json.loads((checkpoint / REPORT_NAME).read_text())
    info = json.loads(json.dumps(server_info(checkpoint, manifest, SERVED, Replayed(4, 0.01, 0.1)), allow_nan=False))
    assert (info["scheme"], info["weight_bits"], info["group_size"], info["kv_bits"]) == ("w8a8", 8, None, 16)
    assert (info["kernels"], info["kv_cache_dtype"], info["tensor_parallel_size"]) == ({"layers.0.up": "onednn"}, "fp8", 2)
    assert info["model"] == {"names": ["tiny"], "folder": str(checkpoint), "max_model_len": 512}
    assert info["self_test"] == {"result": "passed", "texts": 4, "mean_difference_nats": 0.01}
    quality = info["quality"]
    assert quality["method"] == "lrq" and quality["linear_bytes"] == report["quantized_linears"]["bytes"]
    assert quality["blocks"] == [
        {key: block[key] for key in ("block", "error_before", "error_after")} for block in report["blocks"]
    ]
    assert server_info(checkpoint, manifest, SERVED, None)["self_test"] == {"result": "off"}


def test_an_error_that_could_not_be_measured_is_null(checkpoint: Path, tmp_path: Path) -> None:
    report = json.loads((checkpoint / REPORT_NAME).read_text())
    report["blocks"][0]["error_after"] = None
    report["blocks"][1]["layers"]["mlp.up_proj"]["fallback"] = "few tokens"
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    quality = quality_of(tmp_path)
    assert quality is not None
    assert quality["blocks"][0]["error_after"] is None
    assert quality["rounded_to_nearest"] == {"block 2 mlp.up_proj": "few tokens"}


def test_a_checkpoint_without_a_report_has_no_quality(tmp_path: Path) -> None:
    assert quality_of(tmp_path) is None


class Worker(LrqWorkerExtension):
    """As vLLM makes one: the extension beside a class that has the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.get_model = lambda: model


def test_workers_say_which_kernel_each_layer_runs_on() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.ReLU())
    for layer, kernel in zip(model, ("hopper", "triton"), strict=False):
        layer.lrq_kernel = kernel
    assert Worker(model).lrq_kernels() == {"0": "hopper", "1": "triton"}


def test_workers_say_what_was_clipped() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert Worker(model).lrq_clipped_counts() == {}
    model[0].register_buffer("lrq_clipped", torch.tensor([1, 256]))
    assert Worker(model).lrq_clipped_counts() == {"0": (1, 256)}


def test_json_logging_reaches_vllms_processes_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "warning")
    with json_logs():
        path = Path(os.environ["VLLM_LOGGING_CONFIG_PATH"])
        assert json.loads(path.read_text()) == logging_config("WARNING")
        with pytest.raises(SettingsError, match="Unset it"), json_logs():
            pass
    assert not path.exists() and "VLLM_LOGGING_CONFIG_PATH" not in os.environ


def test_the_logging_that_is_configured_exists() -> None:
    configurator = logging.config.DictConfigurator(logging_config("INFO"))
    assert type(configurator.configure_handler(configurator.config["handlers"]["lrq_json"])).__name__ == "JsonLineHandler"
