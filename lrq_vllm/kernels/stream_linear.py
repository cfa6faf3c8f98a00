"""CUDA C++: few tokens times a weight that is streamed at the memory's speed (stream_linear.cu says how).

Twins: reference.quantize_per_token or quantize_static with reference.integer_linear; reference.weight_only_linear. Needs an
NVIDIA GPU of the Hopper generation (bulk copies, clusters); torch compiles the source when a shape first meets it.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from lrq_vllm.kernels import activation_quant, cuda_kernel
from lrq_vllm.kernels.arranged_weight import CHUNK, STRIPE, ArrangedWeight

__all__ = ["MOST_TOKENS", "Input", "plan", "stream_linear", "why_not"]

MOST_TOKENS = 32

_MOST_WARPS = 16
_HELPERS = 96  # threads beside them, that add up and fill
_SHARED_BYTES = 227 * 1024
# Tokens up to which the kernel quantizes activations itself; for more that would take longer than a kernel of its own.
_QUANTIZES_UP_TO = 4


class Input(IntEnum):
    """What x is when the kernel reads it."""

    AS_IT_IS = 0
    PER_TOKEN = 1
    STATIC = 2
    QUANTIZED = 3


# Chunks of one tile of x that a multiplying warp holds at most; more of them need fewer blocks to a cluster.
_HELD = {Input.AS_IT_IS: 8, Input.PER_TOKEN: 8, Input.STATIC: 8, Input.QUANTIZED: 16}


@dataclass(frozen=True)
class Plan:
    """The constants of one compiled kernel, named as in stream_linear.cu."""

    bits: int
    integer: bool
    float16: bool
    x: Input
    tiles: int
    chunks: int
    piece: int
    warps: int
    cluster: int
    stages: int
    turns: int
    reductions: int
    shared_bytes: int

    def source(self) -> str:
        """The kernel's text with its constants in front."""
        constants = "".join(f"#define {field.name.upper()} {int(getattr(self, field.name))}\n" for field in fields(self))
        return constants + files("lrq_vllm.kernels").joinpath("stream_linear.cu").read_text()


def why_not(device: torch.device, out_features: int, in_features: int, bits: int, *, integer: bool) -> str | None:
    """The reason why no kernel here takes such a weight for every number of tokens up to MOST_TOKENS, or None if one does."""
    reason = cuda_kernel.why_not(device)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a GPU of the Hopper generation"
    if (bits, integer) not in ((8, True), (4, True), (4, False), (3, False)):
        return f"{bits}-bit weights with {8 if integer else 16}-bit activations have no such kernel"
    if in_features % STRIPE or out_features % 8:
        return f"{in_features} inputs and {out_features} outputs are no multiples of {STRIPE} and 8"
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for tokens in range(1, MOST_TOKENS + 1):
        for static in (True, False):
            if plan(tokens, (bits, out_features, in_features, integer), _input(tokens, integer, static), processors) is None:
                return f"{tokens} tokens of {in_features} inputs do not fit the registers of a cluster"
    return None


@cache
def plan(tokens: int, weight: tuple[int, int, int, bool], x: Input, processors: int, *, float16: bool = False) -> Plan | None:
    """The kernel for up to this many tokens; None if their activations do not fit the registers of one cluster.

    weight: bits, outputs, inputs, and whether activations are integers. processors: multiprocessors of the GPU.
    """
    bits, out_features, in_features, integer = weight
    tiles = next((tiles for tiles in (1, 2, 4) if tokens <= 8 * tiles), None)
    if tiles is None:
        return None
    total, held = -(-in_features // CHUNK), max(_HELD[x] // tiles, 1)
    cluster = next((cluster for cluster in (1, 2, 4, 8) if total <= cluster * _MOST_WARPS * held), None)
    if cluster is None:
        return None
    chunks = -(-total // (cluster * _MOST_WARPS))
    piece = min(chunks, 2 if bits == 8 else 4)
    chunks = -(-chunks // piece) * piece
    warps, stripes = -(-total // (cluster * chunks)), -(-out_features // STRIPE)
    # Clusters of 4 and 8 do not fill every part of the chip; _compiled counts those that run.
    clusters = processors // cluster if cluster <= 2 else processors * 3 // 4 // cluster
    turns = 1 << (-(-stripes // clusters) - 1).bit_length()
    reductions = max(4 // tiles, 1)
    outputs, row = 128 * tiles, 8 * tiles
    led = -(-turns // cluster)
    fixed = 192 * turns + (12 * warps + 8 * cluster + 20) * row + 4 * reductions * warps * outputs
    fixed += 16 * reductions + 8 * led + 96
    fixed += 4 * led * cluster * outputs if cluster > 1 else 0
    stage = warps * piece * 128 * bits + 16
    stages = min(16, (_SHARED_BYTES - fixed) // stage)
    if stages < 2:
        return None
    return Plan(
        bits, integer, float16, x, tiles, chunks, piece, warps, cluster, stages, turns, reductions, stages * stage + fixed
    )


def stream_linear(
    x: Tensor, weight: ArrangedWeight, bias: Tensor | None, static: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """y [T, N] in x's dtype, for x [T, K] bfloat16 or float16, T <= MOST_TOKENS.

    static: the calibrated step (float32 [1]) and zero-point (uint8 [1]) of the activations; None quantizes per token if
    ``weight.integer``. Raises ValueError if :func:`plan` has none.
    """
    kind = _input(x.shape[0], weight.integer, static is not None)
    if kind is not Input.QUANTIZED:
        return _launch(_aligned(x), static or (x, x), weight, bias, kind, x.dtype)
    q = activation_quant.quantize_static(x, *static) if static else activation_quant.quantize_per_token(x)
    return _launch(q.q, (q.step, q.zero_point), weight, bias, kind, x.dtype)


def _input(tokens: int, integer: bool, static: bool) -> Input:
    if not integer:
        return Input.AS_IT_IS
    if tokens > _QUANTIZES_UP_TO:
        return Input.QUANTIZED
    return Input.STATIC if static else Input.PER_TOKEN


def _aligned(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def _launch(
    x: Tensor, grid: tuple[Tensor, Tensor], weight: ArrangedWeight, bias: Tensor | None, kind: Input, dtype: torch.dtype
) -> Tensor:
    tokens, processors = x.shape[0], torch.cuda.get_device_properties(x.device).multi_processor_count
    y = torch.empty((tokens, weight.out_features), dtype=dtype, device=x.device)
    if not tokens:
        return y
    shape = (weight.bits, weight.out_features, weight.in_features, weight.integer)
    chosen = plan(tokens, shape, kind, processors, float16=dtype == torch.float16)
    if chosen is None:
        raise ValueError(f"no kernel streams a weight of {weight.in_features} inputs for {tokens} tokens")
    stripes, chunks, _ = weight.q.shape
    kernel, clusters, threads = _compiled(chosen, x.device)
    if clusters * chosen.turns < stripes:
        raise ValueError(
            f"this GPU runs {clusters} clusters of {chosen.cluster} blocks at a time: too few for {stripes} stripes"
        )
    kernel.launch(
        min(clusters, stripes) * chosen.cluster,
        threads,
        [
            x, weight.q, weight.facts, *grid, y if bias is None else bias, y,
            int(bias is not None), tokens, weight.out_features, weight.in_features, x.stride(0), chunks, stripes,
        ],
    )  # fmt: skip
    return y


@cache
def _compiled(chosen: Plan, device: torch.device) -> tuple[cuda_kernel.CudaKernel, int, int]:
    """The kernel, how many clusters of it run at the same time, and threads per block."""
    kernel = cuda_kernel.compiled(chosen.source(), "stream_linear", chosen.shared_bytes, device)
    threads = 32 * chosen.warps + _HELPERS
    return kernel, kernel.resident_clusters(chosen.cluster, threads), threads
