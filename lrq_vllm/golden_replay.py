"""Let vLLM read a checkpoint's golden texts, on this machine and with the kernels that will serve. Needs vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrq_vllm.checkpoint.golden import GoldenTexts, mean_difference, read_golden
from lrq_vllm.errors import CheckpointError
from lrq_vllm.kernel_choice import kernels_by_layer
from lrq_vllm.kv_cache import in_16_bits

__all__ = ["Replayed", "kernels_in_use", "kernels_of", "prompt_log_probabilities", "replay", "replay_through", "why_not"]

_KV_CACHE_BYTES = 1 << 28  # more than the texts need; vLLM's default would be most of the GPU
_MEMORY_SHARE = 0.1  # that vLLM wants to be free at its start: other processes may use the rest, which is not needed


@dataclass(frozen=True)
class Replayed:
    """mean_difference, and the tolerance that it was within: nats, as checkpoint/golden.py says. kernels: that the quantized
    layers ran on, if known.
    """

    texts: int
    mean_difference: float
    tolerance: float
    kernels: tuple[str, ...] = ()


def replay(folder: Path, ranks: int = 1, *, expert_parallel: bool = False, compiled: bool = False) -> Replayed:
    """Serve the checkpoint from this process and compare; once in a process. ranks: tensor parallel. expert_parallel: each has
    some experts whole, not a part of all. compiled: as vLLM serves by default, which takes it longer to start.

    Raises CheckpointError if vLLM's numbers are further from the reference path's than rounding explains.
    """
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    golden = read_golden(folder)
    texts = golden.texts
    llm = LLM(
        str(folder), enforce_eager=not compiled, max_model_len=max(len(text.tokens) for text in texts) + 1,
        max_num_seqs=len(texts), enable_prefix_caching=False, kv_cache_memory_bytes=_KV_CACHE_BYTES, skip_tokenizer_init=True,
        gpu_memory_utilization=_MEMORY_SHARE, tensor_parallel_size=ranks, enable_expert_parallel=expert_parallel,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=text.tokens) for text in texts]
    answers = llm.generate(prompts, _sampling(), use_tqdm=False)
    return _judged(folder, golden, golden.tolerance(), answers, tuple(sorted(kernels_in_use(llm))))


async def replay_through(engine: Any, folder: Path) -> Replayed:
    """As :func:`replay`, by a server's own engine (vLLM's EngineClient), before it serves."""
    from vllm.inputs import TokensPrompt

    golden = read_golden(folder)
    tolerance = golden.tolerance(eight_bit_cache=not in_16_bits(engine.vllm_config.cache_config.cache_dtype))
    answers = []
    for place, text in enumerate(golden.texts):
        prompt = TokensPrompt(prompt_token_ids=text.tokens)
        async for answer in engine.generate(prompt, _sampling(), f"lrq-golden-{place}"):
            if answer.finished:
                answers.append(answer)
    return _judged(folder, golden, tolerance, answers)


def why_not(config: Any, max_model_len: int) -> str | None:
    """The reason why a server of a model with this transformers config answers otherwise than the texts say although nothing is
    wrong, or None.

    Rotary tables for long texts ("longrope", as in Phi-3's 128k): transformers takes them for texts that are long, vLLM for all
    texts of a server that takes long ones. The golden texts are short.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    short = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type", rope.get("type")) != "longrope" or short is None or max_model_len <= short:
        return None
    return f"for more than {short} tokens (--max-model-len {max_model_len}) vLLM reads short texts with other rotary tables too"


def kernels_in_use(llm: Any) -> set[str]:
    """:func:`kernels_of` the models of all ranks of vLLM's LLM. Ranks of their own processes must accept functions
    (VLLM_ALLOW_INSECURE_SERIALIZATION=1).
    """
    return set().union(*llm.apply_model(kernels_of))


def kernels_of(model: torch.nn.Module) -> set[str]:
    """The names of the kernels that the quantized layers of one rank's model run on."""
    return set(kernels_by_layer(model).values())


def prompt_log_probabilities(answer: Any, tokens: Sequence[int]) -> list[float]:
    """Of all tokens of a prompt but its first, from vLLM's RequestOutput for it."""
    return [places[token].logprob for places, token in zip(answer.prompt_logprobs[1:], tokens[1:], strict=True)]


def _sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)


def _judged(
    folder: Path, golden: GoldenTexts, tolerance: float, answers: Sequence[Any], kernels: tuple[str, ...] = ()
) -> Replayed:
    served = [prompt_log_probabilities(answer, text.tokens) for answer, text in zip(answers, golden.texts, strict=True)]
    difference = mean_difference(golden.texts, served)
    if not difference <= tolerance:
        on = f", on {', '.join(kernels)}" if kernels else ""
        raise CheckpointError(
            f"{folder}: vLLM's log-probabilities of the texts in the checkpoint differ from the reference path's by "
            f"{difference:.3f} nats on average (at most {tolerance:.3f} is rounding){on}. "
            "Do not serve this: try LRQ_KERNEL=triton on a GPU, another version of vLLM, or quantize again, and report it."
        )
    return Replayed(len(golden.texts), difference, tolerance, kernels)
