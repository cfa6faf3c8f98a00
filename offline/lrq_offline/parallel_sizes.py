"""On how many GPUs a quantized model can be served with tensor parallelism."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from lrq_offline.decoder_blocks import FAMILIES, block_families
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.packing import values_per_group
from lrq_vllm.checkpoint.schema import WeightFormat

__all__ = ["tensor_parallel_sizes"]

_MOST = 64
_VOCABULARY_UNIT = 64  # vllm.model_executor.layers.vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE


def tensor_parallel_sizes(
    config: PreTrainedConfig,
    weight: WeightFormat,
    quantized: Mapping[str, tuple[int, int]],
    hadamard: OnlineHadamard | None = None,
) -> tuple[int, ...]:
    """All sizes up to 64 that divide the heads, the vocabulary, and the inputs of layers that are cut along them.

    quantized: module -> (out, in). vLLM gives each rank whole heads of queries, and whole ones of keys and values or one that
    several ranks share; the vocabulary, filled up to a multiple of 64, it divides evenly. A norm of all heads' keys gathers
    them from the ranks, which must not share any. Layers that read heads or inner values of an MLP or an expert are cut along
    their inputs, between packed words, groups, and the blocks that ``hadamard`` rotates.
    """
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    vocabulary = -(-config.vocab_size // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
    unit = weight.group_size or values_per_group(weight.bits)
    kinds = set(block_families(config).values())
    cut_along_inputs = tuple({name for kind in kinds for name in kind.cut_along_inputs})
    cut = [(inputs, unit) for name, (_, inputs) in quantized.items() if name.endswith(cut_along_inputs)]
    if hadamard is not None:
        cut += [(quantized[name][1], hadamard.block) for name in hadamard.modules]

    def works(size: int) -> bool:
        shared = size % key_value_heads == 0 and not FAMILIES[config.model_type].joint_head_norms
        whole = heads % size == 0 and (key_value_heads % size == 0 or shared) and vocabulary % size == 0
        return whole and all(inputs % (size * unit) == 0 for inputs, unit in cut)

    return tuple(size for size in range(1, _MOST + 1) if size == 1 or works(size))
