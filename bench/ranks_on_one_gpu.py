"""vLLM's workers of one engine, all on the first GPU: what tensor-parallel ranks exchange goes through the host.

NCCL refuses two ranks on one GPU. So a model that ranks share can be checked where there is one, by the kernels that serve
it (served_agreement.py --one-gpu): how fast it is says nothing, and CUDA graphs are off, since the host takes part. It replaces
parts of vLLM that are not its API: seen working with 0.25.1.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.device_communicators import cuda_communicator, pynccl
from vllm.platforms import current_platform
from vllm.v1.worker import gpu_worker

__all__ = ["Worker"]


class Worker(gpu_worker.Worker):
    """vLLM's, as its option worker_cls names it; the processes of an engine import this module each."""

    def init_device(self) -> None:
        """On the first GPU, whatever the rank."""
        self.local_rank = 0
        self.parallel_config.disable_custom_all_reduce = True
        self.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        super().init_device()


class _NoNccl:
    """In place of PyNcclCommunicator."""

    disabled = True

    def __init__(self, group: Any, **_: Any) -> None:
        self.world_size = torch.distributed.get_world_size(group)

    def destroy(self) -> None:
        """There is nothing."""


def _all_reduce(self: Any, input_: Tensor) -> Tensor:
    # gloo adds few types; two ranks' sum in float32 is rounded as NCCL rounds it.
    total = input_.float().cpu() if input_.is_floating_point() else input_.cpu()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    return total.to(input_.dtype).to(input_.device)


def _all_gather(self: Any, input_: Tensor, dim: int = -1) -> Tensor:
    own = input_.cpu().contiguous()
    parts = [torch.empty_like(own) for _ in range(self.world_size)]
    torch.distributed.all_gather([part.view(torch.uint8) for part in parts], own.view(torch.uint8), group=self.cpu_group)
    return torch.cat(parts, dim).to(input_.device)


def _gather(self: Any, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
    whole = _all_gather(self, input_, dim)
    return whole if self.rank_in_group == dst else None


type(current_platform).dist_backend = "gloo"
pynccl.PyNcclCommunicator = _NoNccl
for name, exchange in (("all_reduce", _all_reduce), ("all_gather", _all_gather), ("gather", _gather)):
    setattr(cuda_communicator.CudaCommunicator, name, exchange)
