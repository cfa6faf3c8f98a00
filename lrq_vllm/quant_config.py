"""vLLM's QuantizationConfig for LRQ: the manifest in, one linear method per layer out."""

from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from lrq_vllm.checkpoint.schema import QUANT_METHOD, Manifest
from lrq_vllm.checkpoint.seal import check_seal, hashing_wanted
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors
from lrq_vllm.compilation_key import tell_apart
from lrq_vllm.cpu_compilation import round_where_operations_do
from lrq_vllm.errors import CheckpointError, SettingsError
from lrq_vllm.kv_cache import check_cache_dtype
from lrq_vllm.router_compilation import keep_router_packed
from lrq_vllm.served_rank import check_rank
from lrq_vllm.tensor_parallel import check_ranks
from lrq_vllm.tp_invariance import check_sum
from lrq_vllm.vllm_versions import check_version

__all__ = ["LrqConfig"]

# Where a model class does not say it: Qwen3-MoE's names what its dense blocks fuse only if mlp_only_layers lists some.
_FUSED = {"gate_up_proj": ["gate_proj", "up_proj"]}


class LrqConfig(QuantizationConfig):
    """What ``--quantization lrq``, or quant_method in config.json, turns into. Sent to vLLM's worker processes."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        super().__init__()
        if manifest is None:  # vLLM's way of saying that the model's config.json has no quantization_config
            raise CheckpointError(
                "--quantization lrq was given, but this model's config.json has no quantization_config. "
                "Quantize it first (lrq-offline quantize MODEL_DIR --scheme w4a16), or leave the flag out."
            )
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"LrqConfig(scheme={self.manifest.scheme}, quantized={len(self.manifest.quantized)} modules)"

    def get_name(self) -> str:
        """The name on vLLM's command line."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """float32 is for tests on the CPU."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: int8 tensor cores and bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LrqConfig":
        """From config.json's ``quantization_config``.

        Raises CheckpointError if it is not one that we read, and SettingsError in a vLLM that we do not know.
        """
        check_version(vllm.__version__)
        return cls(Manifest.from_dict(config))

    def maybe_update_config(self, model_name: str, **_: Any) -> None:
        """Check a local folder against its manifest and its seal, in vLLM's main process and before anything is loaded.

        Raises CheckpointError or ModelFolderError naming what is missing, has the wrong shape or was changed.
        """
        folder = Path(model_name)
        # A folder without any weights is vLLM's to judge: --load-format dummy needs none.
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            tensors = TensorFolder(folder)
            check_tensors(tensors, self.manifest)
            check_seal(tensors, content=hashing_wanted())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a model that renames its modules, so that the lists keep matching."""

        def renamed(name: str) -> str:
            return (hf_to_vllm_mapper.apply_list([name]) or [name])[0]

        self.manifest = self.manifest.renamed(renamed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The linear method for a layer; None leaves embeddings, the output head and attention to vLLM.

        Raises CheckpointError for a linear layer that the checkpoint lists nowhere, or quantizes only in part, and
        SettingsError for a KV cache that this vLLM does not compute right or a number of GPUs that cannot serve it.
        """
        from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.platforms import current_platform

        if get_current_vllm_config_or_none() is None and not isinstance(layer, LinearBase):
            return None  # attention asks again where vLLM 0.25 loads weights a second time
        config = get_current_vllm_config()
        if config.lora_config is not None:
            raise SettingsError(
                "LoRA adapters (--enable-lora) cannot be served on top of an lrq checkpoint. Merge the adapter into the float "
                "model, quantize that, and leave the option out."
            )
        # The first layer that asks is the embedding; all others are built after it.
        if current_platform.is_cpu():
            from lrq_vllm.cpu_norms import take_whole_norms

            round_where_operations_do(config.compilation_config)
            take_whole_norms(config.kernel_config)
        tell_apart(config)
        parallel = config.parallel_config
        check_ranks(self.manifest, parallel.tensor_parallel_size, expert_parallel=parallel.enable_expert_parallel)
        check_rank(self.manifest)
        if hasattr(layer, "moe_config"):
            keep_router_packed(config.compilation_config)
            return self._experts_method(prefix, layer.moe_config)
        if not isinstance(layer, LinearBase):
            check_cache_dtype(config.cache_config.cache_dtype, self.manifest, on_cpu=current_platform.is_cpu())
            return None
        modules = self.modules_of(prefix)
        quantized = [name for name in modules if name in self.manifest.quantized]
        if not quantized:
            unknown = [name for name in modules if name not in self.manifest.skipped]
            if unknown:
                raise CheckpointError(
                    f"vLLM builds a layer {prefix}, but the checkpoint lists {unknown[0]} neither as quantized nor as skipped. "
                    "It was made for another architecture: quantize this model again with this version of lrq."
                )
            check_sum(layer, prefix)
            return UnquantizedLinearMethod()
        if len(quantized) != len(modules):
            raise CheckpointError(
                f"vLLM fuses {', '.join(modules)} into {prefix}, but only {', '.join(quantized)} is quantized. "
                "Quantize all of them or none."
            )
        return self._method(modules)

    def modules_of(self, prefix: str) -> list[str]:
        """The checkpoint's modules behind a layer of vLLM: qkv_proj stands for q_proj, k_proj and v_proj, and so on."""
        parent, _, name = prefix.rpartition(".")
        shards = (_FUSED | self.packed_modules_mapping).get(name, [name])
        if prefix in self.manifest.quantized or prefix in self.manifest.skipped:
            shards = [name]  # fused in the checkpoint already
        return [f"{parent}.{shard}" if parent else shard for shard in shards]

    def _experts_method(self, prefix: str, moe_config: Any) -> QuantizeMethodBase:
        from lrq_vllm.experts_method import LrqExpertsMethod

        return LrqExpertsMethod(self.manifest, prefix, moe_config)

    def _method(self, modules: list[str]) -> QuantizeMethodBase:
        from lrq_vllm.linear_integer import LrqW4A4LinearMethod, LrqW4A8LinearMethod, LrqW8A8LinearMethod
        from lrq_vllm.linear_weight_only import LrqWeightOnlyLinearMethod

        match self.manifest.scheme:
            case "w8a8":
                return LrqW8A8LinearMethod(self.manifest, modules)
            case "w4a8":
                return LrqW4A8LinearMethod(self.manifest, modules)
            case "w4a4":
                return LrqW4A4LinearMethod(self.manifest, modules)
            case _:
                return LrqWeightOnlyLinearMethod(self.manifest, modules)
