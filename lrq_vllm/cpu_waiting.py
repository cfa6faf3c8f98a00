"""On a CPU, vLLM's processes wait for each other without taking the processor from everybody else.

The engine's process and its workers look into shared memory and give up the processor (sched_yield) until something is there.
On two cores with Linux 6.18 whoever else has work then gets none for seconds at a time: answers are not sent, and clients that
left are not noticed until their answers are whole. vLLM has another way, for Pythons whose sched_yield keeps the interpreter's
lock: a sleep of no length.
"""

from vllm.distributed import utils as vllm_utils

__all__ = ["wait_asleep"]


def wait_asleep() -> None:
    """Let this process of vLLM wait so, for whatever model it serves."""
    vllm_utils.USE_SCHED_YIELD = False
