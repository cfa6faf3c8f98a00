"""A float model's folder, checked before anything long starts: a known family, complete weights, no foreign code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lrq_offline.decoder_blocks import FAMILIES, HEAD, Family, block_names, empty_model
from lrq_vllm.checkpoint.schema import TensorSpec
from lrq_vllm.checkpoint.store import COMPUTED_ANYWAY, TensorFolder, check_folder, read_config
from lrq_vllm.errors import ModelFolderError, SettingsError, one_paragraph

__all__ = ["SourceModel", "check_model_tensors", "load_tokenizer", "model_config"]

CODE = "auto_map"
"""Where config.json says which code of the model's own folder transformers may run."""

_ATTENTION_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class SourceModel:
    """An opened folder. ``raw_config`` is config.json as it stands, without what is not carried on; ``config`` is the same as
    transformers sees it. names_code: whether config.json names code of the model's own, which is never run.
    """

    folder: Path
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    tensors: TensorFolder
    family: Family
    names_code: bool

    @classmethod
    def open(cls, folder: Path) -> "SourceModel":
        """Open and check a float model. Raises ModelFolderError with all that stands in the way of quantizing it."""
        raw_config = read_config(folder)
        check_float(raw_config, folder)
        config = model_config(raw_config, folder)
        tensors, family = TensorFolder(folder), FAMILIES[config.model_type]
        known = check_model_tensors(empty_model(config), tensors, config)
        _check_outside_of_blocks(tensors, {*known, f"{HEAD}.weight"}, family.blocks)
        kept = {key: value for key, value in raw_config.items() if key not in (CODE, "quantization_config")}
        return cls(folder, kept, config, tensors, family, names_code=raw_config.get(CODE) is not None)

    @property
    def warnings(self) -> list[str]:
        """What a user may want to know of the model."""
        if not self.names_code:
            return []
        return [
            f"config.json names code of its own ({CODE}), which lrq does not run: the model is taken for an ordinary "
            f"{self.config.model_type}"
        ]

    @property
    def block_names(self) -> list[str]:
        """Full names of the decoder blocks, in order."""
        return block_names(self.config, self.family)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self.tensors)

    def spec_of(self, name: str) -> TensorSpec:
        """Dtype and shape in which one tensor is stored, from its header."""
        return self.tensors.spec(name)

    def read_tied(self, name: str) -> Tensor:
        """As :meth:`read`; an output head that the folder does not hold is the embedding."""
        return self.read(name if name in self.names() else f"{self.family.embedding}.weight")

    def stored_bytes(self, name: str) -> int:
        """Size of one tensor."""
        return self.spec_of(name).nbytes

    def read(self, name: str) -> Tensor:
        """One tensor as stored. Raises ModelFolderError if it holds NaN or infinity."""
        tensor = self.tensors.get(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelFolderError(
                f"{self.tensors.file_of(name)}: tensor {name} holds NaN or infinite values. "
                "The model is damaged: download it again, or check how it was trained."
            )
        return tensor


def check_model_tensors(model: nn.Module, tensors: TensorFolder, config: PreTrainedConfig) -> list[str]:
    """The names of the tensors that ``model`` (which may be empty) takes from a folder; a tied output head is not among them.

    Raises ModelFolderError naming each tensor that is missing, has another shape than the model's, or holds integers where it
    has floats.
    """
    tied = {f"{HEAD}.weight"} if config.tie_word_embeddings else set()
    problems, names = [], []
    for name, parameter in model.state_dict().items():
        if name in tensors and tensors.spec(name).shape != tuple(parameter.shape):
            shape = list(tensors.spec(name).shape)
            problems.append(f"tensor {name} has shape {shape}, config.json implies {list(parameter.shape)}")
        elif name in tensors and parameter.is_floating_point() and not tensors.spec(name).dtype.is_floating_point:
            dtype = str(tensors.spec(name).dtype).removeprefix("torch.")
            problems.append(f"tensor {name} holds {dtype}, not floats")
        elif name not in tensors and name not in tied:
            problems.append(f"tensor {name} is missing")
        if name not in tied:
            names.append(name)
    if problems:
        raise ModelFolderError(
            f"{tensors.folder} does not hold the model that its config.json describes: "
            + one_paragraph(problems, "Download or quantize it again.")
        )
    return names


def _check_outside_of_blocks(tensors: TensorFolder, known: set[str], blocks: str) -> None:
    """Raises ModelFolderError for a tensor that belongs to no part of the model: it would go along, and vLLM refuse it."""
    inside = f"{blocks}."
    strangers = [name for name in tensors if not (name in known or name.startswith(inside) or name.endswith(COMPUTED_ANYWAY))]
    if strangers:
        raise ModelFolderError(
            f"{tensors.file_of(strangers[0])}: tensor {strangers[0]} is no part of the model that config.json describes"
            f"{f' (and {len(strangers) - 1} more)' if len(strangers) > 1 else ''}. Save the model without it."
        )


def check_float(raw_config: dict[str, Any], folder: Path) -> None:
    """Raises ModelFolderError if a config.json is that of a quantized model."""
    if raw_config.get("quantization_config") is not None:
        raise ModelFolderError(
            f"{folder} is already quantized (quantization_config in config.json). Give the float model it was made from."
        )


def model_config(raw_config: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """transformers' configuration object for a config.json. Raises ModelFolderError for a family that is not known here.

    Code in the model's own folder is never run: a family that is known here is transformers' own.
    """
    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        code = f" It needs code from its own folder ({CODE}, trust_remote_code), which lrq does not run."
        raise ModelFolderError(
            f"{folder} is a {model_type or 'model of an unnamed type'}; lrq quantizes {', '.join(sorted(FAMILIES))}."
            f"{'' if raw_config.get(CODE) is None else code} "
            "Another family needs an entry in lrq_offline/decoder_blocks.py: where its blocks, norms and linears are."
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(
            {key: value for key, value in raw_config.items() if key != CODE}
        )
        padding = getattr(config, "pad_token_id", None)
        if isinstance(padding, int) and not 0 <= padding < config.vocab_size:
            config.pad_token_id = None  # no embedding to leave out of learning, which nobody does here
    except Exception as error:  # transformers validates with exceptions of several libraries
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelFolderError(
            f"{folder}/config.json is not a valid {model_type} config: {reason}. Download it again."
        ) from error
    if config.num_hidden_layers < 1:
        raise ModelFolderError(f"{folder}/config.json says num_hidden_layers {config.num_hidden_layers}. Download it again.")
    _check_experts(config, folder)
    _check_attention(config, folder)
    return config


def _check_experts(config: PreTrainedConfig, folder: Path) -> None:
    """Raises ModelFolderError for a mixture of experts that has none in any block."""
    names = FAMILIES[config.model_type].experts
    if names is None or any(names.in_block(config, index) for index in range(config.num_hidden_layers)):
        return
    keys = [names.count] if names.dense is None else [names.count, names.dense.listed, names.dense.step]
    raise ModelFolderError(
        f"{folder} has experts in none of its blocks ({', '.join(keys)} in config.json), and vLLM does not serve a "
        f"{config.model_type} without. Use a model that has some."
    )


def _check_attention(config: PreTrainedConfig, folder: Path) -> None:
    """Raises ModelFolderError for attention that the model's family does not have in vLLM."""
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1 and not FAMILIES[config.model_type].mixed_attention:
        mixing = ", ".join(sorted(name for name, family in FAMILIES.items() if family.mixed_attention))
        raise ModelFolderError(
            f"{folder} has blocks of several kinds (layer_types in config.json: {' and '.join(kinds)}), which vLLM does not "
            f"serve for {config.model_type}, only for {mixing}. Use a model without use_sliding_window."
        )
    unknown = set(kinds) - _ATTENTION_KINDS
    if unknown:
        raise ModelFolderError(
            f"{folder} has blocks of a kind that lrq does not know (layer_types in config.json: {', '.join(sorted(unknown))}); "
            f"it knows {' and '.join(sorted(_ATTENTION_KINDS))}. Use a model that has no other."
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelFolderError(
            f"{folder} makes embeddings (use_bidirectional_attention in config.json): its tokens see those after them. lrq "
            "quantizes models that generate text. Use one of those."
        )


def check_length(folder: Path, seq_len: int, config: PreTrainedConfig) -> None:
    """Raises SettingsError if the model was not made for windows of so many tokens."""
    most = _longest_text(config)
    if seq_len > most:
        raise SettingsError(
            f"--seq-len is {seq_len}, but {folder} was made for texts of {most} tokens (max_position_embeddings in "
            f"config.json). Give {most} at most."
        )


def check_vocabulary(folder: Path, tokens: Tensor, config: PreTrainedConfig) -> None:
    """Raises ModelFolderError if the model has no embedding for some of the token ids that its tokenizer gives."""
    largest = int(tokens.max())
    if largest >= config.vocab_size:
        raise ModelFolderError(
            f"{folder} has a tokenizer that gives token {largest}, and a model that knows {config.vocab_size} (vocab_size in "
            "config.json): they do not belong together. Download the tokenizer's files of this model."
        )


def _longest_text(config: PreTrainedConfig) -> int:
    """How many tokens the model was made for, with what its rotary tables are stretched by."""
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = [kind.get("factor") or 1.0 for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    return int(config.max_position_embeddings * max([1.0, *stretched]))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, without network and without the folder's own code. Raises ModelFolderError if it has none."""
    check_folder(folder)
    from transformers import AutoTokenizer  # half a second that `plan` need not wait for

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and the tokenizers library's own
        reason = " ".join(str(error).split())[:300]
        raise ModelFolderError(
            f"{folder} has no tokenizer that can be loaded ({reason}). Download the model's tokenizer files too."
        ) from error
