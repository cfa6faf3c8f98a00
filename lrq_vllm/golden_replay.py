"""Let vLLM read a checkpoint's golden texts, on this machine and with the kernels that will serve. Needs vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lrq_vllm.checkpoint.golden import TOLERANCE, GoldenText, mean_difference, read_golden
from lrq_vllm.errors import CheckpointError

__all__ = ["Replayed", "kernels_of", "replay"]

_KV_CACHE_BYTES = 1 << 28  # more than the texts need; vLLM's default would be most of the GPU


@dataclass(frozen=True)
class Replayed:
    """mean_difference in nats, as checkpoint/golden.py says. kernels: that the quantized layers ran on."""

    texts: int
    mean_difference: float
    kernels: tuple[str, ...]


def replay(folder: Path, ranks: int = 1) -> Replayed:
    """Serve the checkpoint from this process and compare; once in a process. ranks: tensor parallel.

    Raises CheckpointError if vLLM's numbers are further from the reference path's than rounding explains.
    """
    texts = read_golden(folder)
    served, kernels = _served(folder, texts, ranks)
    difference = mean_difference(texts, served)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: vLLM's log-probabilities of the texts in the checkpoint differ from the reference path's by "
            f"{difference:.3f} nats on average (at most {TOLERANCE} is rounding), with the kernels {', '.join(kernels)}. Do "
            "not serve this: try LRQ_KERNEL=triton on a GPU, another version of vLLM, or quantize again, and report it."
        )
    return Replayed(len(texts), difference, kernels)


def kernels_of(model: torch.nn.Module) -> set[str]:
    """The names of the kernels that the quantized layers of one rank's model run on."""
    return {str(module.lrq_kernel) for module in model.modules() if hasattr(module, "lrq_kernel")}


def _served(folder: Path, texts: Sequence[GoldenText], ranks: int) -> tuple[list[list[float]], tuple[str, ...]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        str(folder), enforce_eager=True, max_model_len=max(len(text.tokens) for text in texts) + 1, max_num_seqs=len(texts),
        enable_prefix_caching=False, kv_cache_memory_bytes=_KV_CACHE_BYTES, skip_tokenizer_init=True,
        tensor_parallel_size=ranks,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    answers = llm.generate([TokensPrompt(prompt_token_ids=text.tokens) for text in texts], sampling, use_tqdm=False)
    numbers = [
        [places[token].logprob for places, token in zip(answer.prompt_logprobs[1:], text.tokens[1:], strict=True)]
        for answer, text in zip(answers, texts, strict=True)
    ]
    return numbers, tuple(sorted(set().union(*llm.apply_model(kernels_of))))
