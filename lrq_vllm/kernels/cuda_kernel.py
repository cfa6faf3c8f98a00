"""CUDA C++ that is compiled when first needed, by NVRTC. What torch's CUDA builds bring along is all it takes."""

import ctypes
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CudaKernel", "Source", "binary_of", "boxes", "compiled", "processors", "source", "why_not"]


@cache
def why_not(device: torch.device) -> str | None:
    """The reason why our kernels for Hopper GPUs do not run on ``device``, or None if they do."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is not installed"
    return None if torch.cuda.get_device_capability(device)[0] == 9 else "needs a GPU of the Hopper generation"


class Source(NamedTuple):
    """An ``extern "C"`` kernel and the shared memory in bytes that a block of it takes."""

    name: str
    shared_bytes: int
    text: str


class CudaKernel(NamedTuple):
    """A compiled kernel and the shared memory in bytes that a block of it takes."""

    function: Any
    shared_bytes: int

    def launch(self, blocks: int, threads: int, arguments: list[Any]) -> None:
        """Run on torch's current stream. Tensors are passed as pointers, whole numbers as int, :func:`boxes` as they are.

        The kernel may begin before the one in front of it has ended, and must wait for that itself (griddepcontrol.wait).
        """
        from cuda.bindings import driver

        config = self._configuration(blocks, threads)
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
        values = tuple(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
        kinds = tuple(_kind(argument) for argument in arguments)
        _checked(driver.cuLaunchKernelEx(config, self.function, (values, kinds), 0))

    def resident_clusters(self, cluster: int, threads: int) -> int:
        """How many clusters of so many blocks the GPU runs at the same time."""
        from cuda.bindings import driver

        config = self._configuration(cluster, threads)
        size = driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        config.attrs, config.numAttrs = [size], 1
        return int(_checked(driver.cuOccupancyMaxActiveClusters(self.function, config)))

    def _configuration(self, blocks: int, threads: int) -> Any:
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        return config


def source(name: str, constants: Mapping[str, int], *headers: str, shared_bytes: int = 0, macros: str = "") -> Source:
    """The kernel ``name`` of the file of that name, behind a definition of each constant in capitals and ``headers``."""
    definitions = "".join(f"#define {constant.upper()} {int(value)}\n" for constant, value in constants.items())
    texts = (files("lrq_vllm.kernels").joinpath(file).read_text() for file in (*headers, f"{name}.cu"))
    return Source(name, shared_bytes, definitions + macros + "".join(texts))


def binary_of(source: Source, capability: tuple[int, int]) -> tuple[bytes, str]:
    """Compile for GPUs of this compute capability, a second or so; none is needed. Also what the compiler remarks.

    Raises RuntimeError if it does not compile.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.text.encode(), f"{source.name}.cu".encode(), 0, [], []))
    # "a": with the instructions of this generation alone, like wgmma.
    architecture = "sm_{}{}".format(*capability) + ("a" if capability[0] >= 9 else "")
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"-default-device"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    remarks = log.rstrip(b"\0").decode().strip()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{source.name} does not compile: {remarks}")
    binary = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary, remarks


@cache
def compiled(source: Source, device: torch.device) -> CudaKernel:
    """Compile for ``device`` and load. Raises RuntimeError."""
    from cuda.bindings import driver

    binary, _ = binary_of(source, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # there is a context now, in this thread too
        module = _checked(driver.cuModuleLoadData(binary))
    function = _checked(driver.cuModuleGetFunction(module, source.name.encode()))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, limit, source.shared_bytes))
    return CudaKernel(function, source.shared_bytes)


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def gpu_name(device: torch.device) -> str:
    """As the driver calls it, such as NVIDIA H200."""
    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=65536)
def boxes(
    start: int, rows: int, row_bytes: int, box: tuple[int, int], *, stride: int | None = None, swizzled: bool = False
) -> Any:
    """What a kernel needs to fetch boxes (rows, bytes) of the array at address ``start``; rows are multiples of 16 bytes.

    A box has at most 256 rows of 2048 bytes. What of it lies outside the array comes as zeros. stride: bytes from row to row,
    if more than row_bytes. swizzled: rows of 64 or 128 bytes exchange their 16-byte units, as tensor cores read them.
    """
    from cuda.bindings import driver

    long, short = driver.cuuint64_t, driver.cuuint32_t
    return _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_INT64, 2, start,
            [long(row_bytes // 8), long(rows)], [long(stride or row_bytes)],
            [short(box[1] // 8), short(box[0])], [short(1), short(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle({64: 2, 128: 3}[box[1]] if swizzled else 0),  # ..._64B, ..._128B, ..._NONE
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int if isinstance(argument, int) else None


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned, without its status. Raises RuntimeError if that says something went wrong."""
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
