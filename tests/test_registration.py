"""What the plugin does in a process of vLLM before any model is known."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import lrq_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="looks at vLLM's CPU build"),
]


def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    from lrq_vllm.quant_config import LrqConfig

    lrq_vllm.register()
    assert get_quantization_config("lrq") is LrqConfig


def test_a_vllm_that_lacks_what_the_plugin_changes_starts_other_models_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm import ir

    monkeypatch.delitem(sys.modules, "lrq_vllm.cpu_norms", raising=False)
    monkeypatch.setattr(ir, "ops", object())
    logging.getLogger("vllm").addHandler(caplog.handler)
    lrq_vllm.register()
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert "lrq is not available: it works with vLLM" in caplog.text and "rms_norm" in caplog.text


def test_under_ray_the_plugin_s_variables_are_copied_besides_those_that_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.ray.ray_env import get_env_vars_to_copy

    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "MY_,")
    for name in ("LRQ_CORRECTION_RANK", "MY_NAME", "YOUR_NAME"):
        monkeypatch.setenv(name, "1")
    for _ in range(2):
        lrq_vllm.register()
    assert os.environ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"] == "MY_,LRQ_"
    assert {"LRQ_CORRECTION_RANK", "MY_NAME"} <= get_env_vars_to_copy() - {"YOUR_NAME"} == get_env_vars_to_copy()


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_a_process_of_vllm_may_use_the_tiles_of_amx_before_its_first_product() -> None:
    # arch_prctl(ARCH_GET_XCOMP_PERM), whose bit 18 is the tiles' data.
    program = (
        "import ctypes, lrq_vllm; lrq_vllm.register(); allowed = ctypes.c_uint64();"
        "ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed)); print('tiles', allowed.value >> 18 & 1)"
    )
    ended = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert ended.stdout.splitlines()[-1:] == ["tiles 1"], ended.stderr


def test_on_a_cpu_vllms_processes_do_not_wait_by_giving_up_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """lrq_vllm/cpu_waiting.py says what that does to everybody else."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.utils import sched_yield

    lrq_vllm.register()
    assert shm_broadcast.sched_yield is sched_yield
    given_up: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: given_up.append(None))
    shm_broadcast.sched_yield()
    assert not given_up


def test_in_a_vllm_that_lacks_what_the_plugin_imports_other_models_still_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setitem(sys.modules, "lrq_vllm.quant_config", None)  # importing it fails
    lrq_vllm.register()
    assert "it works with vLLM 0.25 to 0.33" in caplog.text
