"""A run that was stopped goes on where it was, and ends with the very files of a run that was not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lrq_offline import pipeline
from lrq_offline.block_quantizer import BlockQuantizer
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import BlockReport, quantize_model
from lrq_vllm.checkpoint import read_manifest
from lrq_vllm.errors import LrqError, SettingsError
from tests.checkpoints import QUICK, TINY

SETTINGS = QuantizeSettings(scheme="w4a8", **QUICK)


def files_of(folder: Path) -> dict[str, bytes]:
    """What decides how a checkpoint computes: all files but the report, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lrq_report.json"}


CORRECTED = {"scheme": "w4a4", "method": "gptq", "correction_rank": 8, "correction_statistics": "float"}


LEARNED = {"scheme": "w4a4", "method": "lrq", "correction_rank": 8}


@pytest.fixture(
    scope="module", params=[{"scheme": "w4a8"}, {"scheme": "w8a8"}, CORRECTED, LEARNED], ids=["w4a8", "w8a8", "w4a4", "learned"]
)
def settings(request: pytest.FixtureRequest) -> QuantizeSettings:
    return replace(SETTINGS, **request.param)


class _StoppedError(Exception):
    pass


def stop_after(blocks: int) -> Callable[[BlockReport], None]:
    def stop(report: BlockReport) -> None:
        if report.block == blocks:
            raise _StoppedError

    return stop


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, settings: QuantizeSettings) -> None:
    quantize_model(TINY, tmp_path / "whole", settings)
    output = tmp_path / "resumed"
    for blocks in (1, 3):
        with pytest.raises(_StoppedError):
            quantize_model(TINY, output, settings, on_block=stop_after(blocks))
        assert not output.exists()
    seen: list[BlockReport] = []
    report = quantize_model(TINY, output, settings, on_block=seen.append)
    assert [block.resumed for block in seen] == [True, True, True, False]
    assert [block["block"] for block in report["blocks"]] == [1, 2, 3, 4]
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_model_whose_tensors_are_not_in_its_own_dtype_goes_on_too(tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    settings = replace(SETTINGS, scheme="w8a8")
    quantize_model(model, tmp_path / "whole", settings)
    with pytest.raises(_StoppedError):
        quantize_model(model, tmp_path / "resumed", settings, on_block=stop_after(2))
    quantize_model(model, tmp_path / "resumed", settings)
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "whole")


def test_what_a_killed_run_left_half_written_is_not_in_the_result(tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "whole", SETTINGS)
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(_StoppedError):
        quantize_model(TINY, output, SETTINGS, on_block=stop_after(2))
    (partial / "tokenizer.json").write_text("{")
    (partial / ".tmpABC123").write_text("half of a shard")
    (partial / "original").mkdir()
    quantize_model(TINY, output, SETTINGS)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_finished_block_is_not_learned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_StoppedError):
        quantize_model(TINY, tmp_path / "out", SETTINGS, on_block=stop_after(4))

    def never(*arguments: Any) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr(BlockQuantizer, "quantize", never)
    report = quantize_model(TINY, tmp_path / "out", SETTINGS)
    assert len(read_manifest(tmp_path / "out").quantized) == 28
    assert report["seconds"] > sum(block["seconds"] for block in report["blocks"])  # of both runs


@pytest.mark.parametrize("change", [{"iters": 3}, {"seed": 1}, {"scheme": "w4a16"}, {"samples": 3}], ids=str)
def test_a_changed_setting_refuses_and_says_which(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(_StoppedError):
        quantize_model(TINY, tmp_path / "out", SETTINGS, on_block=stop_after(1))
    (name, value), *_ = change.items()
    with pytest.raises(
        SettingsError, match=rf"differs from it in .*{name} \(was {getattr(SETTINGS, name)}, now {value}\).*--restart"
    ):
        quantize_model(TINY, tmp_path / "out", replace(SETTINGS, **change))
    quantize_model(TINY, tmp_path / "out", SETTINGS)  # nothing was lost


def test_a_layer_of_other_weights_is_another_model(tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    with pytest.raises(_StoppedError):
        quantize_model(model, tmp_path / "out", SETTINGS, on_block=stop_after(1))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][400:600] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match="model"):
        quantize_model(model, tmp_path / "out", SETTINGS)


def test_restart_throws_the_unfinished_work_away(tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        quantize_model(TINY, tmp_path / "out", SETTINGS, on_block=stop_after(2))
    seen: list[BlockReport] = []
    quantize_model(TINY, tmp_path / "out", replace(SETTINGS, seed=1), restart=True, on_block=seen.append)
    assert not any(block.resumed for block in seen)


def test_other_code_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_StoppedError):
        quantize_model(TINY, tmp_path / "out", SETTINGS, on_block=stop_after(1))
    original = pipeline.fingerprint
    monkeypatch.setattr(pipeline, "fingerprint", lambda *arguments: {**original(*arguments), "code": "other"})
    with pytest.raises(SettingsError, match="code"):
        quantize_model(TINY, tmp_path / "out", SETTINGS)


def test_an_unfinished_folder_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        quantize_model(TINY, tmp_path / "out", SETTINGS, on_block=stop_after(4))
    (unfinished,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    with pytest.raises(LrqError):
        read_manifest(unfinished)


# Forks runs that count the functions they enter and leave; each but the first kills itself at a random count.
_KILLED_RUNS = """
import os, random, signal, sys
from pathlib import Path
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model

model, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def run(output, last):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0
    def profile(frame, event, argument):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(profile)
    quantize_model(model, folder / output, QuantizeSettings(scheme="w4a8", iters=2, samples=2, seq_len=32))
    sys.setprofile(None)
    (folder / "events").write_text(str(count))
    os._exit(0)

assert run("whole", 0) == 0
events, chance, killed = int((folder / "events").read_text()), random.Random(0), 0
while killed < kills:
    status = run("killed", chance.randrange(events))
    if status == 0:  # the run that went on was shorter than that: it is done, begin another
        import shutil
        shutil.rmtree(folder / "killed")
        continue
    assert status == -signal.SIGKILL and not (folder / "killed").exists(), status
    killed += 1
assert run("killed", 0) == 0
print(killed)
"""


def test_killed_at_random_points_ten_times_the_files_are_those_of_one_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED_RUNS, str(TINY), str(tmp_path), "10"]
    ended = subprocess.run(command, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == "10"
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
