"""Several processes that learn each block together: what one GPU's process gives, from the shares of all."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_offline.compute import Machine
from lrq_offline.config import QuantizeSettings
from lrq_offline.learned_scales import LrqScale
from lrq_offline.pipeline import quantize_model
from lrq_offline.quantized_block import FakeQuantizedLinear
from lrq_offline.rank_processes import started_ranks
from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_offline.sharded_rounding import ShardedRounding, finish_backward
from lrq_offline.step_search import search_steps
from lrq_offline.weight_transfers import transfers_between
from lrq_vllm.checkpoint.affine import StepAndZeroPoint
from lrq_vllm.checkpoint.packing import unpack
from lrq_vllm.checkpoint.store import TensorFolder, read_manifest
from lrq_vllm.errors import SettingsError
from tests.checkpoints import QUICK, TINY


def test_the_shares_of_all_ranks_are_the_whole() -> None:
    ranks = [Ranks(rank, 3) for rank in range(3)]
    windows, weight = torch.arange(12).view(6, 2), torch.randn(9, 4)
    assert sorted(window for rank in ranks for window in rank.share(windows).tolist()) == windows.tolist()
    assert torch.equal(torch.cat([rank.own_rows(weight) for rank in ranks]), weight)


def test_one_rank_changes_nothing() -> None:
    values = torch.randn(4, 3)
    for given in (
        ONE_RANK.share,
        ONE_RANK.own_rows,
        ONE_RANK.all_rows,
        ONE_RANK.joined,
        ONE_RANK.own_rows_of_sum,
        ONE_RANK.sum,
        ONE_RANK.smallest,
    ):
        assert torch.equal(given(values.clone()), values)


def gradients(ranks: Ranks) -> dict[str, Tensor]:
    """Of every parameter of a scale, for a loss of which each rank knows a part."""
    torch.manual_seed(0)
    weight, size, parts = torch.randn(8, 16), 0.1 * torch.randn(8, 4), torch.randn(2, 8, 16)
    steps = search_steps(weight, 3)
    own = LrqScale(
        ranks.own_rows(weight),
        StepAndZeroPoint(*map(ranks.own_rows, steps)),
        3,
        4,
        torch.Generator().manual_seed(0),
        ranks=ranks,
    )
    with torch.no_grad():
        own.left.copy_(ranks.own_rows(size))
    rounding = own if ranks.size == 1 else ShardedRounding(own, ranks)
    (rounding() * ranks.share(parts).sum(dim=0)).sum().backward()
    finish_backward(rounding, ranks)
    return {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}


def check_gradients(ranks: Ranks) -> None:
    one, own = gradients(ONE_RANK), gradients(ranks)
    assert set(own) == set(one) == {"log_step", "left", "right", "row", "column"}
    for name, gradient in own.items():
        expected = one[name] if name == "column" else ranks.own_rows(one[name])
        torch.testing.assert_close(gradient, expected, msg=lambda text, name=name: f"{name}: {text}")


def correction_gradients(ranks: Ranks) -> dict[str, Tensor]:
    """Of a layer's correction, where each rank computes with its share of the windows."""
    torch.manual_seed(0)
    weight, windows = torch.randn(8, 16), torch.randn(4, 3, 16)
    generator, steps = torch.Generator().manual_seed(0), StepAndZeroPoint(*map(ranks.own_rows, search_steps(weight, 3)))
    own = LrqScale(ranks.own_rows(weight), steps, 3, 4, generator, ranks=ranks)
    layer = FakeQuantizedLinear(own if ranks.size == 1 else ShardedRounding(own, ranks), None, None)
    layer.correct(torch.randn(8, 2).bfloat16(), torch.randn(16, 2).bfloat16(), torch.float32)
    layer.learn_correction()
    layer(ranks.share(windows)).square().sum().backward()
    finish_backward(layer, ranks)
    assert layer.correction is not None
    return {name: parameter.grad for name, parameter in layer.correction.named_parameters() if parameter.grad is not None}


def check_correction_gradients(ranks: Ranks) -> None:
    one, own = correction_gradients(ONE_RANK), correction_gradients(ranks)
    assert set(own) == set(one) == {"u", "v"}
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, one[name], rtol=1e-4, atol=1e-4)


def test_each_of_two_processes_gets_the_whole_gradients_of_a_correction() -> None:
    with started_ranks(2, torch.device("cpu"), check_correction_gradients) as ranks:
        check_correction_gradients(ranks)


def test_each_of_two_processes_gets_the_gradients_of_its_rows_and_of_what_is_shared() -> None:
    with started_ranks(2, torch.device("cpu"), check_gradients) as ranks:
        check_gradients(ranks)


def test_nothing_of_ended_processes_is_used_again() -> None:
    with started_ranks(2, torch.device("cpu"), check_gradients) as ranks:
        check_gradients(ranks)
        assert transfers_between.cache_info().currsize == 1
    assert transfers_between.cache_info().currsize == 0


@pytest.mark.parametrize("loss", ["mse", "fisher"])
def test_two_processes_learn_what_one_does(loss: str, tmp_path: Path) -> None:
    # Every batch is both windows: all see the same text at every step. A greater rate than this magnifies float32 noise.
    settings = QuantizeSettings("w4a16", **{**QUICK, "batch_size": 2, "iters": 3, "learning_rate": 2e-3}, renew=True, loss=loss)
    outputs, reports = [], []
    for processes in (1, 2):
        outputs.append(tmp_path / str(processes))
        reports.append(quantize_model(TINY, outputs[-1], settings, machine=Machine("cpu", gpus=processes)))
    one, two = ([block["error_after"] for block in report["blocks"]] for report in reports)
    assert two == pytest.approx(one, rel=0.03)
    manifest, folders = read_manifest(outputs[0]), [TensorFolder(output) for output in outputs]
    assert set(folders[0]) == set(folders[1])
    for module, (_, in_features) in manifest.quantized.items():
        first, second = (unpack(folder.get(f"{module}.qweight"), 4, in_features).int() for folder in folders)
        assert (first != second).float().mean() < 0.02, module


def test_two_processes_learn_corrections_as_good_as_one_does(tmp_path: Path) -> None:
    # GPTQ, where learning begins, passes float32 noise on from column to column: errors can be compared, integers cannot.
    settings = QuantizeSettings("w4a8", **{**QUICK, "batch_size": 2, "seq_len": 128, "iters": 3}, correction_rank=4)
    one, two = (
        [
            block["error_after"]
            for block in quantize_model(TINY, tmp_path / str(processes), settings, machine=Machine("cpu", gpus=processes))[
                "blocks"
            ]
        ]
        for processes in (1, 2)
    )
    assert two == pytest.approx(one, rel=0.05)


FAILING = """
import sys
import threading
import torch
from lrq_offline.rank_processes import started_ranks
from lrq_vllm.errors import LrqError, ModelFolderError

def fail(ranks):
    raise {error}

if __name__ == "__main__":
    try:
        with started_ranks(2, torch.device("cpu"), fail) as ranks:
            {meanwhile}
    except LrqError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""


# What rank 0 does: a sum waits for its other half, which will never come, or fails because that is gone.
WAITING, SUMMING = "threading.Event().wait()", "ranks.sum(torch.zeros(1))"


def run_failing(folder: Path, error: str, meanwhile: str) -> subprocess.CompletedProcess[str]:
    script = folder / "run.py"
    script.write_text(FAILING.format(error=error, meanwhile=meanwhile))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)


def test_a_process_that_fails_ends_the_run_and_says_why(tmp_path: Path) -> None:
    ended = run_failing(tmp_path, 'RuntimeError("out of memory")', WAITING)
    assert ended.returncode == 1
    assert "RuntimeError: out of memory" in ended.stderr and "a GPU's process failed" in ended.stderr


@pytest.mark.parametrize("meanwhile", [WAITING, SUMMING])
def test_bad_input_that_another_process_meets_first_is_one_paragraph_and_exit_code_2(tmp_path: Path, meanwhile: str) -> None:
    ended = run_failing(tmp_path, 'ModelFolderError("model.safetensors: truncated.")', meanwhile)
    assert ended.returncode == 2
    assert "model.safetensors: truncated." in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("gpus", "changes", "said"),
    [
        (0, {}, "gpus is 0"),
        (3, {}, "the outputs of model.layers.0.self_attn.q_proj"),
        (2, {"samples": 3}, "samples \\(3\\) cannot be divided by 2 GPUs"),
        (4, {"samples": 4}, "batch-size \\(2\\) cannot be divided by 4 GPUs"),
        (2, {"method": "lrq", "rank": 5}, "the rank of model.layers.0.self_attn.q_proj \\(5\\)"),
    ],
)
def test_work_that_cannot_be_divided_is_refused_before_it_starts(
    tmp_path: Path, gpus: int, changes: dict[str, Any], said: str
) -> None:
    settings = QuantizeSettings("w4a16", **{"method": "rtn", **QUICK, **changes})
    with pytest.raises(SettingsError, match=said):
        quantize_model(TINY, tmp_path / "out", settings, machine=Machine("cpu", gpus=gpus))
    assert list(tmp_path.iterdir()) == []
