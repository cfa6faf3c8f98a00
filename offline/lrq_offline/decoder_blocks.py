"""Where the decoder blocks and their linear layers are in a model family, and how one block is brought into memory.

Modelling code is transformers' own. A family is declared, not coded: add an entry to FAMILIES.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lrq_offline.attention import attend, use_attention
from lrq_offline.experts import DenseBlocks, ExpertNames, Experts
from lrq_vllm.errors import ModelFolderError

__all__ = [
    "FAMILIES",
    "HEAD",
    "Family",
    "block_families",
    "block_family",
    "block_names",
    "blocks_of",
    "empty_model",
    "load_block",
    "restore_constants",
    "with_names_of_files",
]

HEAD = "lm_head"  # what every family calls its output head


@dataclass(frozen=True)
class Family:
    """Names inside a decoder model.

    blocks: the list of decoder blocks. embedding, rotary: modules that run before the blocks. final_norm: after them.
    residual: per block, each module that reads the residual stream and the one whose output then joins it.
    norms: per block, all norms.
    activation_functions: how the names of the MLP's activation functions end.
    linear_groups: per block, the linear layers to quantize; those of one group read the same input, and a server
    fuses them into one layer, so they share one activation step.
    producers: for each linear group, the norm or linear layer whose output, channel by channel, scales the group's input. If
    such a layer puts out more than that, what the group reads comes last. None: the group reads the residual stream itself.
    attention_output: the layer that reads the values, each head's shared by several heads of queries.
    gain_offset: what norms add to the gains that are stored, and then keep in float32.
    joint_head_norms: whether a norm of queries or keys spans all heads.
    float32_rotary: whether the server rotates queries and keys by tables in float32, with torch; others round the tables.
    mixed_attention: whether some blocks may see a window and others all tokens (config.json's layer_types).
    renamed: modules of a block that transformers calls differently than checkpoint files do: its name, and the files'. All
    other names here are the files'.
    experts, expert_count: of a mixture of experts. Where a block has them, :func:`block_family` puts their linear layers, as
    many as a model has, in place of the MLP's.
    """

    blocks: str
    embedding: str
    rotary: str
    final_norm: str
    residual: tuple[tuple[str, str], ...]
    norms: tuple[str, ...]
    activation_functions: str
    linear_groups: tuple[tuple[str, ...], ...]
    producers: tuple[str | None, ...]
    attention_output: str
    gain_offset: float = 0.0
    joint_head_norms: bool = False
    float32_rotary: bool = False
    mixed_attention: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    experts: ExpertNames | None = None
    expert_count: int = 0

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, by their names within the block."""
        return tuple(name for group in self.linear_groups for name in group)

    def seen_at(self, group: tuple[str, ...]) -> str:
        """The module that receives the input of a group: one of its layers, or the experts, each of which sees some tokens."""
        if self.experts is not None and group[0] == self.experts.inputs_of(0)[0]:
            return self.experts.module
        return group[0]

    def also_reads(self, group: tuple[str, ...]) -> tuple[str, ...]:
        """Modules with a weight [..., in] that is not quantized and reads what the group reads."""
        return () if self.experts is None or self.seen_at(group) != self.experts.module else (self.experts.router,)

    @property
    def stages(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Layers that receive the same tokens, together with others that do not depend on them; the stages in order."""
        if self.experts is None:
            return tuple((group,) for group in self.linear_groups)
        names, experts = self.experts, range(self.expert_count)
        outside = tuple((group,) for group in self.linear_groups if not group[0].startswith(f"{names.module}."))
        return (
            *outside,
            tuple(names.inputs_of(expert) for expert in experts),
            tuple((names.output_of(expert),) for expert in experts),
        )

    @property
    def cut_along_inputs(self) -> tuple[str, ...]:
        """The linear layers that read what others put out, and are cut along their inputs by tensor parallelism."""
        groups = zip(self.linear_groups, self.producers, strict=True)
        return tuple(name for group, producer in groups if producer in self.linears for name in group)

    @property
    def reads_mlp(self) -> tuple[str, ...]:
        """The linear layers that read the MLP's inner values."""
        return tuple(name for name in self.cut_along_inputs if name != self.attention_output)

    @property
    def norms_read_residual(self) -> bool:
        """Whether norms, and nothing else, read the residual stream: a server then adds and normalizes in one operation."""
        return all(reader in self.norms for reader, _ in self.residual)


_LLAMA = Family(
    blocks="model.layers",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    final_norm="model.norm",
    residual=(("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    norms=("input_layernorm", "post_attention_layernorm"),
    activation_functions="mlp.act_fn",
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    producers=("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"),
    attention_output="self_attn.o_proj",
)

_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_GEMMA = replace(
    _LLAMA,
    residual=(
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    producers=("input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"),
    gain_offset=1.0,
    mixed_attention=True,
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": replace(
        _LLAMA,
        activation_functions="mlp.activation_fn",
        linear_groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        producers=("input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"),
    ),
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, norms=_LLAMA.norms + _HEAD_NORMS),
    "olmo2": replace(
        _LLAMA,
        residual=(("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
        norms=("post_attention_layernorm", "post_feedforward_layernorm", *_HEAD_NORMS),
        producers=(None, "self_attn.v_proj", None, "mlp.up_proj"),
        joint_head_norms=True,
        float32_rotary=True,  # vLLM serves it with transformers' own modelling code
    ),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, norms=_GEMMA.norms + _HEAD_NORMS),
    "mixtral": replace(
        _LLAMA,
        linear_groups=_LLAMA.linear_groups[:2],  # no block is without experts
        producers=_LLAMA.producers[:2],
        residual=(("input_layernorm", "self_attn"), ("post_attention_layernorm", "block_sparse_moe")),
        activation_functions=".act_fn",
        renamed=(("mlp", "block_sparse_moe"),),
        experts=ExpertNames(
            "block_sparse_moe.experts", "block_sparse_moe.gate", "w1", "w3", "w2", "num_local_experts", "intermediate_size"
        ),
    ),
    "qwen3_moe": replace(
        _LLAMA,
        norms=_LLAMA.norms + _HEAD_NORMS,
        activation_functions=".act_fn",
        experts=ExpertNames(
            "mlp.experts",
            "mlp.gate",
            "gate_proj",
            "up_proj",
            "down_proj",
            "num_experts",
            "moe_intermediate_size",
            dense=DenseBlocks("mlp_only_layers", "decoder_sparse_step"),
        ),
    ),
}
"""By config.json's model_type."""


def block_family(config: PreTrainedConfig, index: int) -> Family:
    """The family as block ``index``, from 0, of a model has it: with the layers of all its experts, or without experts."""
    family = FAMILIES[config.model_type]
    if family.experts is None:
        return family
    if not family.experts.in_block(config, index):
        return replace(family, experts=None)
    names, count = family.experts, int(getattr(config, family.experts.count))
    experts = range(count)
    norm, mlp = next((reader, joiner) for reader, joiner in family.residual if names.module.startswith(f"{joiner}."))
    groups = zip(family.linear_groups, family.producers, strict=True)
    outside = {group: producer for group, producer in groups if not group[0].startswith(f"{mlp}.")}
    return replace(
        family,
        expert_count=count,
        linear_groups=(
            *outside,
            tuple(name for expert in experts for name in names.inputs_of(expert)),
            *((names.output_of(expert),) for expert in experts),
        ),
        producers=(*outside.values(), norm, *(names.inputs_of(expert)[1] for expert in experts)),
    )


def block_families(config: PreTrainedConfig) -> dict[str, Family]:
    """By the full names of a model's decoder blocks, in order, the family as each of them has it."""
    names = block_names(config, FAMILIES[config.model_type])
    return {name: block_family(config, index) for index, name in enumerate(names)}


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model for ``config`` with every parameter on the meta device: shapes and no memory.

    Modules are called as in checkpoint files. Raises ModelFolderError for a config that transformers builds no model of.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    except Exception as error:  # whatever a wrong value leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelFolderError(
            f"transformers cannot build the {config.model_type} model that config.json describes ({reason}). Download it again."
        ) from error
    use_attention(model.config, "lrq", attend)
    return with_names_of_files(model)


def with_names_of_files(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with its blocks' modules called as in checkpoint files; experts are apart, and their weights undefined."""
    family = FAMILIES[model.config.model_type]
    for index, block in enumerate(blocks_of(model, family)):
        for own, in_files in family.renamed:
            module = block.get_submodule(own)
            delattr(block, own)
            block.add_module(in_files, module)
            # Where transformers looks for it: no submodule, so that its parameters have one name.
            block.__dict__[own] = module
        if family.experts is not None and family.experts.in_block(model.config, index):
            name = family.experts.module
            block.set_submodule(name, Experts(block.get_submodule(name), family.experts))
    return model


def block_names(config: PreTrainedConfig, family: Family) -> list[str]:
    """Full names of a model's decoder blocks, in order."""
    return [f"{family.blocks}.{index}" for index in range(config.num_hidden_layers)]


def blocks_of(model: nn.Module, family: Family) -> nn.ModuleList:
    """The model's decoder blocks, in order."""
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def restore_constants(model: nn.Module, family: Family, config: PreTrainedConfig) -> None:
    """Build what no checkpoint holds, for a model made by :func:`empty_model`: the rotary embedding's tables, and by what
    some families multiply the embedding.
    """
    rotary: nn.Module = model.get_submodule(family.rotary)
    model.set_submodule(family.rotary, type(rotary)(config=config))
    embedding: Any = model.get_submodule(family.embedding)
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)


def load_block(
    model: nn.Module, name: str, read: Callable[[str], Tensor], dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    """A copy of the module ``name`` of an empty model with its tensors read, in ``dtype`` (None: as stored) on ``device``."""
    block = copy.deepcopy(model.get_submodule(name))
    state = {key: read(f"{name}.{key}").to(device=device, dtype=dtype) for key in block.state_dict()}
    block.load_state_dict(state, strict=True, assign=True)
    return block.requires_grad_(False)
