"""What this environment can serve, and what stands in its way: ``lrq-offline doctor``."""

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

import torch

from lrq_vllm import kernel_choice, layer_self_test, saturation, served_rank, tp_invariance
from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.checkpoint.schema import SCHEMES
from lrq_vllm.checkpoint.seal import HASH_VARIABLE
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernel_choice import Named
from lrq_vllm.kernels.reference import integer_weight
from lrq_vllm.vllm_environment import vllm_executable
from lrq_vllm.vllm_versions import SUPPORTED, supports

__all__ = ["Finding", "diagnose", "kernel_candidates", "quiet", "vllm_findings"]

_INSTALL = "pip install '.[cuda]' in a clone of lrq, or '.[cpu]' without a GPU"
_SIDE = 512  # of the layer that kernels are asked about
_VARIABLES = (
    kernel_choice.VARIABLE, layer_self_test.VARIABLE, saturation.VARIABLE, served_rank.VARIABLE, tp_invariance.VARIABLE,
    HASH_VARIABLE, "VLLM_PLUGINS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line. cure: what to do if this keeps lrq checkpoints from being served, else empty."""

    subject: str
    detail: str
    cure: str = ""


def diagnose() -> list[Finding]:
    """Look at versions, the plugin, the devices and each kernel. Imports vLLM if it is there; needs no model."""
    with quiet():
        return [*_python(), *vllm_findings(), *_command(), *_devices(), *_kernels(), *_variables()]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what vLLM tells while it is imported."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("lrq", _version_or("lrq", "no package metadata"))
    yield Finding("torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")
    for package, needed in (("transformers", "lrq-offline needs"), ("cuda-bindings", "the hopper kernels need")):
        yield Finding(package, _version_or(package, f"not installed; {needed} it"))


def _version_or(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def vllm_findings() -> Iterator[Finding]:
    """Whether vLLM is here, in a version that the plugin works with, and finds the plugin. Imports vLLM."""
    if find_spec("vllm") is None:
        yield Finding("vllm", "not installed", _INSTALL)
        return
    try:
        import vllm
        from vllm.model_executor.layers.quantization import get_quantization_config
        from vllm.plugins import load_general_plugins
    except Exception as error:  # a broken installation fails in any way
        yield Finding("vllm", f"cannot be imported ({type(error).__name__}: {error})", _INSTALL)
        return
    cure = "" if supports(vllm.__version__) else f"install a version from {SUPPORTED}"
    yield Finding(
        "vllm", f"{vllm.__version__}, {'supported' if not cure else 'not supported'} (lrq works with {SUPPORTED})", cure
    )
    if not any(point.name == "lrq" for point in entry_points(group="vllm.general_plugins")):
        yield Finding(
            "plugin", "vLLM does not find it: its package metadata are missing", "install lrq with pip, do not copy it"
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "lrq" not in allowed.split(","):
        yield Finding("plugin", f"kept out by VLLM_PLUGINS={allowed}", "add lrq to VLLM_PLUGINS, or unset it")
        return
    load_general_plugins()
    yield Finding("plugin", f"found by vLLM as {get_quantization_config('lrq').__name__}")


def _command() -> Iterator[Finding]:
    """`vllm serve` and `vllm bench`; lrq-server serve does without."""
    command = vllm_executable()
    yield Finding("command", command or "no vllm command", "" if command else _INSTALL)


def _devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        detail = f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        too_old = (about.major, about.minor) < (8, 0)
        yield Finding(f"GPU {index}", detail, "use a GPU of the Ampere generation or later" if too_old else "")
    cpu = torch.cpu.get_capabilities()
    skills = [name for name in ("avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if cpu.get(name, False)]
    yield Finding(
        "CPU", f"{cpu.get('cpu_name', platform.machine())}: {', '.join(skills) or 'no vector instructions that matter'}"
    )


def kernel_candidates(scheme: str) -> list[tuple[Named, str | None]]:
    """Every kernel for a layer of no odd size, the best first, and the reason why it cannot run here, or None if it can.

    Raises ImportError without vLLM.
    """
    from lrq_vllm.integer_backends import LayerInput, integer_candidates
    from lrq_vllm.layer_input import input_kind
    from lrq_vllm.weight_only_backends import PackedWeight, weight_only_candidates

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bits, activation = SCHEMES[scheme].weight_bits, SCHEMES[scheme].activation
    qweight = pack(torch.zeros(_SIDE, _SIDE, dtype=torch.int64), bits).to(device)
    step = torch.ones(_SIDE, 1, device=device)
    zero_point = torch.zeros(_SIDE, 1, dtype=torch.uint8, device=device)
    if activation is None:
        packed = PackedWeight(qweight, step, zero_point, bits, _SIDE, torch.bfloat16)
        return [*weight_only_candidates(packed)]
    weight = integer_weight(qweight, step, zero_point, bits, _SIDE)
    return [*integer_candidates(weight, LayerInput(_SIDE, torch.bfloat16, input_kind(activation)))]


def _kernels() -> Iterator[Finding]:
    """For each scheme, the kernel that runs it here and why those before it do not."""
    for scheme in SCHEMES:
        try:
            candidates = [(kernel.name, reason) for kernel, reason in kernel_candidates(scheme)]
        except ImportError as error:  # vLLM's extension
            yield Finding(scheme, f"not known: {error}", "install vLLM")
            continue
        runs = next((kernel for kernel, reason in candidates if reason is None), None)
        others = "; ".join(f"{kernel}: {reason}" for kernel, reason in candidates if reason is not None)
        cure = "" if runs else "serve on an NVIDIA GPU of the Ampere generation or later, or an x86 CPU with vLLM's CPU build"
        yield Finding(scheme, f"runs on {runs or 'no kernel'}" + (f" ({others})" if others else ""), cure)


def _variables() -> Iterator[Finding]:
    for name in _VARIABLES:
        if name in os.environ:
            yield Finding(name, os.environ[name], _cure_of(name))


def _cure_of(variable: str) -> str:
    """What to do about its value if no checkpoint can be served with it, else empty."""
    try:
        match variable:
            case kernel_choice.VARIABLE:
                _check_kernel(os.environ[variable])
            case layer_self_test.VARIABLE:
                layer_self_test.wanted()
            case saturation.VARIABLE:
                saturation.asked_for()
            case served_rank.VARIABLE:
                served_rank.served_rank()
            case tp_invariance.VARIABLE:
                tp_invariance.invariant()
    except SettingsError as error:
        return str(error)
    return ""


def _check_kernel(name: str) -> None:
    """Raises SettingsError if no scheme runs on a kernel of this name here."""
    try:
        names = {kernel.name for scheme in SCHEMES for kernel, reason in kernel_candidates(scheme) if reason is None}
    except ImportError:  # vLLM's, which is said elsewhere
        return
    if name and name not in names:
        raise SettingsError(f"name one of {', '.join(sorted(names))}, or unset it")
