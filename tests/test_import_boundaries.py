"""Who may import whom, looked at in fresh interpreters."""

import subprocess
import sys

import pytest

HEAVY = ("vllm", "transformers", "triton", "fastapi", "lrq_offline", "lrq_server")


def loaded_by(module: str) -> set[str]:
    """The top-level packages that importing a module brings in."""
    script = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", script], check=True, text=True, capture_output=True).stdout
    return set(printed.split())


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("lrq_vllm", (*HEAVY, "torch")),
        ("lrq_vllm.errors", (*HEAVY, "torch")),
        ("lrq_vllm.checkpoint", HEAVY),
        ("lrq_vllm.kernels.reference", HEAVY),
        ("lrq_vllm.kernels.reference_experts", HEAVY),
        ("lrq_vllm.kernels.expert_routes", HEAVY),
        ("lrq_vllm.kernels.ops", tuple(name for name in HEAVY if name != "triton")),
        ("lrq_offline.pipeline", ("vllm", "lrq_server")),
        ("lrq_offline.reference_model", ("vllm", "lrq_server")),
        ("lrq_offline.verification", ("vllm", "lrq_server")),
        ("lrq_vllm.diagnosis", HEAVY),
        ("lrq_vllm.pages.html", (*HEAVY, "matplotlib")),
        ("lrq_vllm.pages.pictures", HEAVY),
        ("lrq_server.cli", ("vllm", "transformers", "lrq_offline")),
        ("lrq_server.engine", ("vllm", "transformers", "lrq_offline")),
        ("lrq_vllm.worker_extension", HEAVY),
    ],
)
def test_a_module_does_not_bring_in_what_it_must_not_need(module: str, forbidden: tuple[str, ...]) -> None:
    assert not loaded_by(module).intersection(forbidden)
