"""``lrq-offline doctor`` on environments that can and cannot serve."""

import importlib.util
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

from lrq_offline.cli import main
from lrq_vllm import diagnosis

pytestmark = pytest.mark.vllm


def test_an_environment_that_can_serve_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for subject in ("torch", "vllm", "plugin", "command", "CPU", "w8a8", "w4a8", "w4a16", "w3a16"):
        assert f"\n{subject} " in printed
    assert printed.endswith("Checkpoints can be served here.\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why kernels for GPUs do not run")
def test_each_kernel_says_why_it_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("w4a8 ")]
    assert "runs on onednn" in line and "hopper: needs an NVIDIA GPU" in line and "triton: needs a CUDA device" in line


def without_vllm(patch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    patch.setattr(diagnosis, "find_spec", lambda name: None if name == "vllm" else found(name))


def with_an_old_vllm(patch: pytest.MonkeyPatch) -> None:
    import vllm

    patch.setattr(vllm, "__version__", "0.19.0")


def without_metadata(patch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> tuple[Any, ...]:
        return ()

    def version_of(package: str) -> str:
        if package == "lrq":
            raise PackageNotFoundError
        return version(package)

    patch.setattr(diagnosis, "entry_points", none)
    patch.setattr(diagnosis, "version", version_of)


def kept_out(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("VLLM_PLUGINS", "another")


def with_variable(name: str, value: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv(name, value)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without_vllm, "vllm: pip install"),
        (with_an_old_vllm, "vllm: install a version from 0.25 to 0.33"),
        (without_metadata, "plugin: install lrq with pip"),
        (kept_out, "plugin: add lrq to VLLM_PLUGINS"),
        (partial(with_variable, "LRQ_KERNEL", "foo"), "LRQ_KERNEL: name one of"),
        (partial(with_variable, "LRQ_CORRECTION_RANK", "half"), "give a whole number of columns"),
        (partial(with_variable, "LRQ_SELFTEST", "true"), "LRQ_SELFTEST is 'true': give 1"),
        (partial(with_variable, "LRQ_TP_INVARIANT", "yes"), "LRQ_TP_INVARIANT is 'yes': give 1"),
        (partial(with_variable, "LRQ_SATURATION", "on"), "LRQ_SATURATION is 'on': give 1"),
    ],
)
def test_what_stands_in_the_way_is_named_with_its_cure(
    break_it: Callable[[pytest.MonkeyPatch], None], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    break_it(monkeypatch)
    assert main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1
