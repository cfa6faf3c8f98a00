"""CUDA C++ that is compiled when first needed, by NVRTC. What torch's CUDA builds bring along is all it takes."""

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CudaKernel", "compiled", "why_not"]


def why_not(device: torch.device) -> str | None:
    """The reason why nothing can be compiled for ``device``, or None if it can."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is not installed"
    return None


class CudaKernel(NamedTuple):
    """A compiled kernel and the shared memory in bytes that a block of it takes."""

    function: Any
    shared_bytes: int

    def launch(self, blocks: int, threads: int, arguments: list[Tensor | int]) -> None:
        """Run on torch's current stream. Tensors are passed as pointers, whole numbers as int.

        The kernel may begin before the one in front of it has ended, and must wait for that itself (griddepcontrol.wait).
        """
        from cuda.bindings import driver

        config = self._configuration(blocks, threads)
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
        values = tuple(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
        kinds = tuple(ctypes.c_void_p if isinstance(argument, Tensor) else ctypes.c_int for argument in arguments)
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


@cache
def compiled(source: str, name: str, shared_bytes: int, device: torch.device) -> CudaKernel:
    """Compile the ``extern "C"`` kernel ``name`` for ``device``; a second or so. Raises RuntimeError."""
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17", b"-default-device"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{name} does not compile: {log.decode().strip()}")
    binary = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # there is a context now, in this thread too
        module = _checked(driver.cuModuleLoadData(binary))
    function = _checked(driver.cuModuleGetFunction(module, name.encode()))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return CudaKernel(function, shared_bytes)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned, without its status. Raises RuntimeError if that says something went wrong."""
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
