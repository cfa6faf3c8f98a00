"""CUDA C++: few tokens times a weight that is streamed at the memory's speed (stream_linear.cu says how).

Twins: reference.quantize_input with reference.integer_linear; reference.weight_only_linear. Needs an
NVIDIA GPU of the Hopper generation (bulk copies, clusters); torch compiles the source when a shape first meets it.
"""

from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from lrq_vllm.kernels import cuda_kernel, quantize_tokens
from lrq_vllm.kernels.arranged_weight import CHUNK, STRIPE, ArrangedWeight, WeightShape
from lrq_vllm.kernels.quantize_tokens import IntegerTokens, aligned
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind

__all__ = ["MOST_TOKENS", "Input", "plan", "read_as", "source", "stream_linear", "takes"]

MOST_TOKENS = 32

_MOST_WARPS = 16
_HELPERS = 96  # threads beside them, that add up and fill
_SHARED_BYTES = 227 * 1024
# Tokens up to which the kernel quantizes activations itself (QUANTIZED_HERE); for more that would take longer than a kernel of
# its own.
_QUANTIZES_UP_TO = 4


class Input(IntEnum):
    """What x is when the kernel reads it."""

    AS_IT_IS = 0
    PER_TOKEN = InputKind.PER_TOKEN
    STATIC = InputKind.STATIC
    CLIPPED = InputKind.CLIPPED
    QUANTIZED = quantize_tokens.QUANTIZED


# Chunks of one tile of x that a multiplying warp holds at most; more of them need fewer blocks to a cluster.
_HELD = {Input.AS_IT_IS: 8, Input.PER_TOKEN: 8, Input.STATIC: 8, Input.CLIPPED: 8, Input.QUANTIZED: 16}


@dataclass(frozen=True)
class Plan:
    """The constants of one compiled kernel, named as in stream_linear.cu."""

    bits: int
    integer: bool
    float16: bool
    grouped: bool
    kind: Input
    tiles: int
    chunks: int
    piece: int
    warps: int
    cluster: int
    stages: int
    turns: int
    reductions: int
    shared_bytes: int

    def source(self) -> cuda_kernel.Source:
        """The kernel's text with its constants in front."""
        headers = ("hopper.cuh", "weight_chunk.cuh")
        constants = asdict(self) | {"centred": False}
        return cuda_kernel.source("stream_linear", constants, *headers, shared_bytes=self.shared_bytes)


def read_as(tokens: int, weight: WeightShape, kind: InputKind) -> Input:
    """What the kernel reads when :func:`stream_linear` is given so many tokens that are not quantized yet."""
    if not weight.integer:
        return Input.AS_IT_IS
    return Input.QUANTIZED if tokens > _QUANTIZES_UP_TO else Input(kind)


def takes(tokens: int, weight: WeightShape, device: torch.device, x: Input) -> bool:
    """Whether the activations of so many tokens fit the registers of one cluster."""
    return plan(tokens, weight, x, cuda_kernel.processors(device)) is not None


def source(tokens: int, weight: WeightShape, dtype: torch.dtype, device: torch.device, x: Input) -> cuda_kernel.Source:
    """The kernel that :func:`stream_linear` compiles for so many tokens, which it :func:`takes`."""
    return _plan(tokens, weight, x, dtype, device).source()


@cache
def plan(tokens: int, weight: WeightShape, x: Input, processors: int, *, float16: bool = False) -> Plan | None:
    """The kernel for up to this many tokens; None if their activations do not fit the registers of one cluster.

    processors: multiprocessors of the GPU.
    """
    bits, integer, out_features, in_features, grouped, whole_outputs = weight
    tiles = next((tiles for tiles in (1, 2, 4) if tokens <= 8 * tiles), None)
    quantizes = x not in (Input.AS_IT_IS, Input.QUANTIZED)
    if tiles is None or (quantizes and tokens > _QUANTIZES_UP_TO):
        return None
    most = min(_HELD[x], 8) if grouped else _HELD[x]  # totals of chunks take registers too
    total, held = -(-in_features // CHUNK), max(most // tiles, 1)
    cluster = next((cluster for cluster in (1, 2, 4, 8) if total <= cluster * _MOST_WARPS * held), None)
    if cluster is None:
        return None
    chunks = -(-total // (cluster * _MOST_WARPS))
    piece = min(chunks, 2 if bits == 8 else 4)
    chunks = -(-chunks // piece) * piece
    warps, stripes = -(-total // (cluster * chunks)), -(-(whole_outputs or out_features) // STRIPE)
    # Clusters of 4 and 8 do not fill every part of the chip; _compiled counts those that run.
    clusters = processors // cluster if cluster <= 2 else processors * 3 // 4 // cluster
    turns = 1 << (-(-stripes // clusters) - 1).bit_length()
    reductions = max(4 // tiles, 1)
    outputs, row = 128 * tiles, 8 * tiles
    led = -(-turns // cluster)
    fixed = 192 * turns + (12 * warps + 8 * cluster + 20) * row + 4 * reductions * warps * outputs
    fixed += 16 * reductions + 8 * led + 96 + (64 * _QUANTIZES_UP_TO * warps if quantizes else 0)
    fixed += 4 * led * cluster * outputs if cluster > 1 else 0
    stage = warps * piece * weight.chunk_bytes + 16
    stages = min(16, (_SHARED_BYTES - fixed) // stage)
    if stages < 2:
        return None
    return Plan(
        bits, integer, float16, grouped, x, tiles, chunks, piece, warps, cluster, stages, turns, reductions,
        stages * stage + fixed,
    )  # fmt: skip


def stream_linear(
    x: IntegerTokens | Tensor, weight: ArrangedWeight, bias: Tensor | None, grid: InputGrid = PER_TOKEN
) -> Tensor:  # fmt: skip
    """y [T, N] in x's dtype, for x [T, K] bfloat16 or float16, or its integers, without totals; T <= MOST_TOKENS.

    grid: how x is quantized if the weight's activations are integers and x has none yet. Raises ValueError if :func:`plan` has
    none.
    """
    if not isinstance(x, IntegerTokens):
        given = read_as(len(x), weight.shape, grid.kind)
        if given is not Input.QUANTIZED:
            return _launch(aligned(x), grid.kind, grid.calibrated, weight, bias, given, x.dtype)
        x = quantize_tokens.quantize_tokens(x, grid)  # a kernel of its own
    return _launch(x.q, x.kind, (x.step, x.zero_point), weight, bias, Input.QUANTIZED, x.dtype)


def _launch(
    x: Tensor, kind: InputKind, grids: tuple[Tensor, ...], weight: ArrangedWeight, bias: Tensor | None, given: Input,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens = len(x)
    outputs, inputs = weight.shape.out_features, weight.shape.in_features
    y = torch.empty((tokens, outputs), dtype=dtype, device=x.device)
    if not tokens:
        return y
    chosen = _plan(tokens, weight.shape, given, dtype, x.device)
    stripes, chunks, _ = weight.q.shape
    kernel, clusters, threads = _compiled(chosen, x.device)
    if clusters * chosen.turns < stripes:
        raise ValueError(
            f"this GPU runs {clusters} clusters of {chosen.cluster} blocks at a time: too few for {stripes} stripes"
        )
    first, second, *_ = *grids, x, x
    kernel.launch(
        min(clusters, stripes) * chosen.cluster,
        threads,
        [
            x, weight.q, weight.facts, first, second, y if bias is None else bias, y,
            int(kind), int(bias is not None), tokens, outputs, inputs, x.stride(0), chunks, stripes,
        ],
    )  # fmt: skip
    return y


def _plan(tokens: int, weight: WeightShape, kind: Input, dtype: torch.dtype, device: torch.device) -> Plan:
    chosen = plan(tokens, weight, kind, cuda_kernel.processors(device), float16=dtype == torch.float16)
    if chosen is None:
        raise ValueError(f"no kernel streams a weight of {weight.in_features} inputs for {tokens} tokens")
    return chosen


@cache
def _compiled(chosen: Plan, device: torch.device) -> tuple[cuda_kernel.CudaKernel, int, int]:
    """The kernel, how many clusters of it run at the same time, and threads per block."""
    kernel = cuda_kernel.compiled(chosen.source(), device)
    threads = 32 * chosen.warps + _HELPERS
    return kernel, kernel.resident_clusters(chosen.cluster, threads), threads
