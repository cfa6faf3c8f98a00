"""lrq-server serve: what it finds out before vLLM loads, and what it hands to vLLM."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrq_server import engine, preflight
from lrq_server.cli import main
from lrq_server.preflight import Gpu, Progress, cpu_memory_problems, file_problems, gpu_memory_problems
from lrq_server.serve_settings import ServeSettings
from lrq_server.serving_memory import MemoryNeed, memory_need
from lrq_vllm.checkpoint.golden import GOLDEN_NAME
from lrq_vllm.checkpoint.seal import HASH_VARIABLE, write_seal
from lrq_vllm.checkpoint.store import INDEX_NAME, TensorFolder, read_config, read_manifest
from lrq_vllm.errors import SettingsError
from tests.checkpoints import TINY, Checkpoints
from tests.logs import records_of

pytestmark = pytest.mark.vllm
GIB = 2**30
# Whatever else runs on this machine.
ANY_PORT = ("--port", "0")


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Checkpoints) -> Path:
    """Not to be changed."""
    return checkpoints("w4a16", "lrq")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The options, manifest, settings and environment with which vLLM would have been started, if it would."""
    calls: list[Any] = []

    def serve(*arguments: Any) -> int:
        calls.extend([*arguments, dict(os.environ)])
        return 0

    monkeypatch.setattr(engine, "serve", serve)
    before = dict(os.environ)
    yield calls
    os.environ.clear()
    os.environ.update(before)


def change_one_value(folder: Path) -> str:
    """Of a tensor, whose name is returned; its shape stays."""
    folder_tensors = TensorFolder(folder)
    name = next(name for name in folder_tensors if name.endswith("weight_step"))
    path = folder_tensors.file_of(name)
    tensors = load_file(path)
    tensors[name][0] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def test_serve_hands_every_option_to_vllm(checkpoint: Path, served: list[Any]) -> None:
    options = ["--enforce-eager", "--max-model-len", "1k", "--served-model-name", "a", "b"]
    assert main(["serve", str(checkpoint), *ANY_PORT, "--max-request-mb", "2", *options]) == 0
    parsed, manifest, settings, environment = served
    assert (parsed.model, parsed.quantization, parsed.tensor_parallel_size) == (str(checkpoint), "lrq", 1)
    assert (parsed.enforce_eager, parsed.max_model_len, parsed.served_model_name) == (True, 1000, ["a", "b"])
    assert manifest.scheme == "w4a16" and settings.max_request_bytes == 2_000_000
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_serve_gives_a_checkpoint_the_cache_that_it_asks_for(copy: Path, served: list[Any]) -> None:
    config = read_config(copy)
    config["quantization_config"] = replace(read_manifest(copy), kv_bits=8).to_dict()
    (copy / "config.json").write_text(json.dumps(config))
    write_seal(copy, config)
    own = "int8_per_token_head" if torch.cuda.is_available() else "fp8"
    (copy.parent / "vllm.yaml").write_text("kv-cache-dtype: bfloat16\n")
    for options, wanted in (
        ([], own),
        (["--kv-cache-dtype=auto"], "auto"),
        (["--kv-cache-dtype", "auto"], "auto"),
        (["--kv_cache_dtype", "bfloat16"], "bfloat16"),
        (["--config", str(copy.parent / "vllm.yaml")], "bfloat16"),
    ):
        served.clear()
        assert main(["serve", str(copy), *ANY_PORT, *options]) == 0
        assert served[0].kv_cache_dtype == wanted


@pytest.mark.parametrize("option", ["--tensor-parallel-size=2", "-tp=2"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs two GPUs")
def test_serve_hands_a_number_of_gpus_on_that_can_serve(option: str, checkpoint: Path, served: list[Any]) -> None:
    assert main(["serve", str(checkpoint), *ANY_PORT, option]) == 0
    assert served[0].tensor_parallel_size == 2 and served[3]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs two GPUs")
def test_serve_takes_a_number_of_gpus_from_vllms_file(checkpoint: Path, served: list[Any], tmp_path: Path) -> None:
    (tmp_path / "vllm.yaml").write_text("tensor-parallel-size: 2\n")
    for options, ranks in ([], 2), (["--tensor_parallel_size", "1"], 1):
        served.clear()
        assert main(["serve", str(checkpoint), *ANY_PORT, "--config", str(tmp_path / "vllm.yaml"), *options]) == 0
        assert served[0].tensor_parallel_size == ranks


@pytest.mark.parametrize("option", [["--max-logprobs", "0"], ["--logprobs-mode", "raw_logits"]], ids=" ".join)
def test_what_a_self_test_cannot_read_is_refused(
    option: list[str], checkpoint: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(checkpoint), *ANY_PORT, *option]) == 0
    monkeypatch.setenv("LRQ_SELFTEST", "1")
    assert main(["serve", str(checkpoint), *ANY_PORT, *option]) == 2
    assert f"{' '.join(option)} does not go with the self-test" in capsys.readouterr().err


def test_serve_counts_what_is_clipped_only_where_something_can_be(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(checkpoints("w4a8", "lrq")), "--count-clipped"]) == 2
    assert "w4a8 checkpoint has no calibrated ranges" in capsys.readouterr().err


def test_serve_refuses_columns_of_a_correction_that_is_not_there(
    checkpoint: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(checkpoint), "--correction-rank", "8"]) == 2
    assert "no low-rank correction" in capsys.readouterr().err and not served


def test_serve_refuses_an_unquantized_model(served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(TINY)]) == 2
    assert "lrq-offline quantize" in capsys.readouterr().err
    assert not served


def test_serve_names_a_missing_file(
    checkpoint: Path, tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shards = sorted(checkpoint.glob("*.safetensors"))
    for path in (checkpoint / "config.json", checkpoint / INDEX_NAME, *shards[1:]):
        (damaged / path.name).write_bytes(path.read_bytes())
    assert main(["serve", str(damaged), *ANY_PORT]) == 2
    assert f"file {shards[0].name} is missing" in capsys.readouterr().err
    assert not served


def test_all_problems_are_one_message(
    copy: Path, served: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = change_one_value(copy)
    (copy / GOLDEN_NAME).unlink()
    monkeypatch.setenv("LRQ_SELFTEST", "1")
    monkeypatch.setenv("LRQ_KERNEL", "abacus")
    monkeypatch.setenv("LRQ_TP_INVARIANT", "yes")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.0001")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ["--tensor-parallel-size", "3", "--headless", "--host", "127.0.0.1", "--port", port]
        assert main(["serve", str(copy), *options]) == 2
    said = capsys.readouterr().err.strip()
    wanted = [
        f"tensor {changed} has other content", f"has no {GOLDEN_NAME}", "Use 2 or 4.", "--headless does not go with",
        f"Port {port} of 127.0.0.1 cannot be had", "LRQ_KERNEL is 'abacus'", "LRQ_TP_INVARIANT is 'yes'",
    ]  # fmt: skip
    if not torch.cuda.is_available():
        wanted.append("VLLM_CPU_KVCACHE_SPACE gives 0.0 GiB")
    assert [words for words in wanted if words not in said] == []
    assert f"for {len(wanted)} reasons" in said and "\n" not in said.partition("lrq-server: ")[2]
    assert not served


@pytest.mark.parametrize("options", [["--api-server-count", "2"], ["--data-parallel-size", "2"], ["--enable-ssl-refresh"]])
def test_options_of_other_servers_are_refused(
    checkpoint: Path, options: list[str], served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(checkpoint), *ANY_PORT, *options]) == 2
    assert f"{options[0]} does not go with `lrq-server serve`" in capsys.readouterr().err
    assert not served


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-model-length", "10"], "unrecognized arguments: --max-model-length 10"),
        (["--max-model-len", "many"], "argument --max-model-len"),
        (["--logging-config.pylogging_config_file", "{folder}/text"], "vLLM does not take these options"),
        (["--port", "70000"], "There is no port 70000"),
        (["-tp", "0"], "--tensor-parallel-size 0 cannot serve"),
        (["--pipeline-parallel-size", "0"], "--pipeline-parallel-size is 0"),
        (["--max-request-mb", "inf"], "--max-request-mb is inf"),
        (["--ssl-certfile", "{folder}/none"], "none is no file"),
        (["--ssl-keyfile", "{folder}/text"], "without --ssl-certfile"),
        (["--ssl-certfile", "{folder}/text", "--ssl-keyfile", "{folder}/text"], "cannot be used"),
    ],
)
def test_options_that_cannot_be_are_one_paragraph_before_anything_is_loaded(
    options: list[str], said: str, checkpoint: Path, tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("neither JSON nor PEM")
    options = [option.format(folder=tmp_path) for option in options]
    assert main(["serve", str(checkpoint), *([] if "--port" in options else ANY_PORT), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not served


def test_a_config_without_what_memory_is_reckoned_from_is_named_by_its_seal(
    copy: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["num_attention_heads"]
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["serve", str(copy), *ANY_PORT]) == 2
    assert "num_attention_heads" in capsys.readouterr().err
    assert not served


def test_changed_content_is_found_unless_hashing_is_left_out(
    copy: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = change_one_value(copy)
    assert main(["serve", str(copy), *ANY_PORT]) == 2
    assert f"tensor {changed} has other content" in capsys.readouterr().err
    assert main(["serve", str(copy), *ANY_PORT, "--skip-hash"]) == 0
    # vLLM's side of the plugin, in the same environment, does not read it either.
    assert served[3][HASH_VARIABLE] == "0"


def test_without_hashing_a_changed_config_is_still_found(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    (problem,) = file_problems(copy, read_manifest(copy), hash_files=False)
    assert "rms_norm_eps in config.json is 0.001 and was 1e-05" in problem


def test_hashing_says_every_few_seconds_how_far_it_is() -> None:
    seconds = iter([0.0, 2.0, 5.0, 5.0, 6.0])
    with records_of("vllm.lrq_server.preflight") as records:
        progress = Progress(Path("model"), 4 * GIB, lambda: next(seconds))
        for _ in range(3):
            progress(GIB)
    assert [record.getMessage() for record in records] == [
        "Comparing model with its seal: 2.0 GiB of 4.0 GiB read (--skip-hash leaves this out)."
    ]


def test_memory_is_counted_as_it_is_served(checkpoint: Path) -> None:
    tensors, manifest, config = TensorFolder(checkpoint), read_manifest(checkpoint), read_config(checkpoint)
    gpu = memory_need(tensors, manifest, config, 1, None, 16, on_cpu=False)
    assert gpu.weight_bytes == sum(tensors.spec(name).nbytes for name in tensors)
    # 4 blocks, keys and values, 2 heads of 64 numbers of 2 bytes, for the 2048 tokens that config.json knows.
    assert (gpu.tokens, gpu.kv_bytes) == (2048, 4 * 2 * 2 * 64 * 2 * 2048)
    half = memory_need(tensors, manifest, config, 2, 100, 8, on_cpu=False)
    assert (half.weight_bytes, half.kv_bytes) == (gpu.weight_bytes // 2, 4 * 2 * 1 * 64 * 1 * 100)
    # On a CPU 4-bit weights become 16-bit numbers.
    weights = sum(rows * columns for rows, columns in manifest.quantized.values())
    cpu = memory_need(tensors, manifest, config, 1, None, 16, on_cpu=True)
    assert cpu.weight_bytes - gpu.weight_bytes == 2 * weights - manifest.quantized_bytes
    # Blocks that see a window keep no more than that.
    windows = dict(config) | {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert memory_need(tensors, manifest, windows, 1, 100, 16, on_cpu=False).kv_bytes == 2 * 2 * 2 * 64 * 2 * (10 + 100)


def test_a_gpu_that_is_too_small_or_too_full_is_named() -> None:
    options = SimpleNamespace(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None)
    need = MemoryNeed(60 * GIB, 20 * GIB, 100_000)
    assert gpu_memory_problems(need, [Gpu(99 * GIB, 100 * GIB)], options) == []
    full, small = gpu_memory_problems(need, [Gpu(50 * GIB, 100 * GIB), Gpu(80 * GIB, 80 * GIB)], options)
    assert "GPU 0 has 50.0 GiB of 100.0 GiB free" in full and "takes 90.0 GiB" in full
    assert "Weights take 60.0 GiB of GPU 1" in small and "100,000 tokens 20.0 GiB, and there are 72.0 GiB" in small


def test_a_machine_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_host_bytes", lambda: 10 * GIB)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert cpu_memory_problems(MemoryNeed(3 * GIB, GIB, 100), 2) == []
    (problem,) = cpu_memory_problems(MemoryNeed(4 * GIB, GIB, 100), 2)
    assert "take 12.0 GiB of memory, and 10.0 GiB are available" in problem


@pytest.mark.parametrize(
    "wrong",
    [{"max_request_mb": 0}, {"max_concurrent_requests": 0}, {"drain_seconds": -1}, {"drain_seconds": float("nan")}],
)
def test_limits_that_let_nothing_in_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"--{next(iter(wrong)).replace('_', '-')} is "):
        ServeSettings(**wrong)
