"""The plugin inside vLLM's own layers, without an engine: loading, sharding rules, arithmetic, torch.compile."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_vllm import integer_backends, kv_cache, layer_self_test, saturation, weight_only_backends
from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest
from lrq_vllm.errors import CheckpointError, SettingsError
from tests.vllm_layers import (
    INTEGERS,
    Tensors,
    load,
    lrq_config,
    manifest_for,
    plugin_world,
    random_tensors,
    reference_outputs,
    whole_graph,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="builds vLLM's layers on the CPU, which needs its CPU build"),
]

PREFIX = "model.layers.0.self_attn"
QKV = {f"{PREFIX}.q_proj": (256, 256), f"{PREFIX}.k_proj": (128, 256), f"{PREFIX}.v_proj": (128, 256)}
OUTPUT = {f"{PREFIX}.o_proj": (256, 256)}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with plugin_world():
        yield


@dataclass
class Loaded:
    """A layer of vLLM's with its tensors loaded, and each module's tensors by suffix."""

    layer: Any
    tensors: Tensors
    manifest: Manifest

    def expected(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The reference path's output: the modules side by side."""
        y = torch.cat(reference_outputs(self.manifest, self.tensors, x), dim=-1)
        return y if bias is None else (y.float() + bias.float()).to(y.dtype)


def empty_layer(manifest: Manifest, *, bias: bool = False) -> Any:
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    config = lrq_config(manifest)
    if manifest.quantized.keys() == QKV.keys():
        return QKVParallelLinear(256, 64, 4, 2, bias=bias, quant_config=config, prefix=f"{PREFIX}.qkv_proj", return_bias=False)
    return RowParallelLinear(256, 256, bias=bias, quant_config=config, prefix=f"{PREFIX}.o_proj", return_bias=False)


def loaded_layer(manifest: Manifest, *, bias: bool = False) -> Loaded:
    layer = empty_layer(manifest, bias=bias)
    tensors = {module: random_tensors(manifest, module) for module in manifest.quantized}
    load(layer, tensors)
    if bias:
        layer.bias.data.copy_(torch.randn_like(layer.bias))
    layer.quant_method.process_weights_after_loading(layer)
    return Loaded(layer, tensors, manifest)


def check_agreement(y: Tensor, expected: Tensor, scheme: str, bias: bool) -> None:
    if scheme in INTEGERS and not bias:
        assert torch.equal(y, expected)  # integers: the same bits
    else:  # bfloat16 keeps 8 bits of a sum whose terms may be larger than it
        assert (y.float() - expected.float()).norm() <= 4e-3 * expected.float().norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("modules", [QKV, OUTPUT], ids=["qkv", "o"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_what_the_reference_says(scheme: str, modules: dict[str, tuple[int, int]], bias: bool) -> None:
    loaded = loaded_layer(manifest_for(scheme, modules), bias=bias)
    for shape in ((1, 256), (7, 256), (2, 3, 256)):
        x = torch.randn(shape, dtype=torch.bfloat16) * 3
        y = loaded.layer(x)
        assert y.dtype == torch.bfloat16
        check_agreement(y, loaded.expected(x, loaded.layer.bias), scheme, bias)


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core"])
def test_where_onednn_may_not_use_vnni_bytes_are_multiplied_in_halves(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    made = loaded_layer(manifest_for("w8a8", OUTPUT))
    assert made.layer.lrq_halved
    x = torch.randn(7, 256, dtype=torch.bfloat16) * 3
    check_agreement(made.layer(x), made.expected(x, None), "w8a8", bias=False)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
def test_groups_of_inputs_are_served(scheme: str) -> None:
    loaded = loaded_layer(manifest_for(scheme, QKV, group_size=64))
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    expected = loaded.expected(x, None)
    check_agreement(loaded.layer(x), expected, scheme, False)
    compiled = whole_graph(loaded.layer)
    assert (compiled(x).float() - expected.float()).norm() <= 4e-3 * expected.float().norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_give_no_outputs(scheme: str) -> None:
    layer = loaded_layer(manifest_for(scheme, OUTPUT)).layer
    assert layer(torch.empty(0, 256, dtype=torch.bfloat16)).shape == (0, layer.output_size)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_strided_input_is_taken_as_it_is(scheme: str) -> None:
    loaded = loaded_layer(manifest_for(scheme, OUTPUT))
    x = torch.randn(5, 512, dtype=torch.bfloat16)[:, ::2]
    assert torch.equal(loaded.layer(x), loaded.expected(x.contiguous(), None))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_compiles_whole_and_for_any_number_of_tokens(scheme: str) -> None:
    loaded = loaded_layer(manifest_for(scheme, OUTPUT))
    compiled = whole_graph(loaded.layer)
    for tokens in (3, 8):
        x = torch.randn(tokens, 256, dtype=torch.bfloat16)
        expected = loaded.expected(x, None).float()
        assert (compiled(x).float() - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tensor_that_never_comes_is_named(scheme: str) -> None:
    manifest = manifest_for(scheme, QKV)
    layer = empty_layer(manifest)
    tensors = {module: random_tensors(manifest, module) for module in manifest.quantized}
    del tensors[f"{PREFIX}.k_proj"]["weight_zero_point"]
    load(layer, tensors)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight_zero_point was not loaded"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("suffix", ["qweight", "weight_step", "weight_zero_point"])
def test_a_tensor_of_the_wrong_shape_is_named(suffix: str) -> None:
    manifest = manifest_for("w3a16", QKV)
    layer, tensor = empty_layer(manifest), random_tensors(manifest, f"{PREFIX}.q_proj")[suffix]
    with pytest.raises(CheckpointError, match=rf"q_proj\.{suffix} is .* in the checkpoint"):
        getattr(layer, suffix).weight_loader(getattr(layer, suffix), torch.cat([tensor, tensor]), "q")


def test_fused_layers_with_different_activation_steps_are_refused() -> None:
    manifest = manifest_for("w8a8", QKV)
    layer = empty_layer(manifest)
    tensors = {module: random_tensors(manifest, module) for module in manifest.quantized}
    tensors[f"{PREFIX}.v_proj"]["input_step"] *= 2
    load(layer, tensors)
    with pytest.raises(CheckpointError, match="carry different input_step"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_cache_that_vllm_misreads_on_a_cpu_is_refused() -> None:
    from vllm.config import get_current_vllm_config

    config = lrq_config(manifest_for("w8a8", QKV))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_current_vllm_config().cache_config, "cache_dtype", "int8_per_token_head")
        with pytest.raises(SettingsError, match="--kv-cache-dtype fp8"):
            config.get_quant_method(torch.nn.Embedding(1, 1), "model.embed_tokens")


def test_a_16_bit_cache_where_8_bits_were_asked_for_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_cache._warn_of_16_bits.cache_clear()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = lrq_config(replace(manifest_for("w8a8", QKV), kv_bits=8))
    assert config.get_quant_method(torch.nn.Embedding(1, 1), "model.embed_tokens") is None
    assert "--kv-cache-dtype fp8" in caplog.text


def test_a_layer_that_the_checkpoint_does_not_know_is_refused() -> None:
    manifest = manifest_for("w4a16", {"model.layers.7.mlp.up_proj": (256, 256)})
    with pytest.raises(CheckpointError, match=r"o_proj neither as quantized nor as skipped"):
        empty_layer(manifest)


def test_a_fused_mlp_is_known_where_the_model_class_does_not_say_what_it_fuses() -> None:
    parts = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    for modules in (parts, ["model.layers.0.mlp.gate_up_proj"]):  # apart in the checkpoint, or fused there already
        config = lrq_config(manifest_for("w4a16", dict.fromkeys(modules, (256, 256))))
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        assert config.modules_of("model.layers.0.mlp.gate_up_proj") == modules


def test_a_skipped_layer_stays_unquantized() -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    manifest = manifest_for("w4a16", {"model.layers.7.mlp.up_proj": (256, 256)})
    skipping = Manifest(manifest.scheme, manifest.weight, manifest.quantized, (f"{PREFIX}.o_proj",), "test")
    assert isinstance(empty_layer(skipping).quant_method, UnquantizedLinearMethod)


def test_a_folder_without_weights_is_left_to_vllm(tmp_path: Path) -> None:
    from lrq_vllm.quant_config import LrqConfig

    LrqConfig(manifest_for("w4a16", OUTPUT)).maybe_update_config(str(tmp_path))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_self_test_passes_a_right_layer_and_names_a_wrong_one(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(layer_self_test.VARIABLE, "1")
    manifest = manifest_for(scheme, OUTPUT)
    loaded_layer(manifest)
    for backend in (integer_backends.OneDnnBackend, weight_only_backends.ExpandedBackend):
        right = backend.linear
        monkeypatch.setattr(backend, "linear", lambda *arguments, right=right: 0.97 * right(*arguments))
    with pytest.raises(CheckpointError, match=rf"Self-test .*{scheme} {PREFIX}\.o_proj"):
        loaded_layer(manifest)


@pytest.mark.parametrize(("version", "works"), [("0.24.3", False), ("0.25.1", True), ("0.33.0", True), ("0.34.0rc1", False)])
def test_a_vllm_that_is_not_known_is_refused_with_the_versions_that_are(
    version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    from lrq_vllm.quant_config import LrqConfig

    monkeypatch.setattr(vllm, "__version__", version)
    config = manifest_for("w4a16", OUTPUT).to_dict()
    if works:
        assert LrqConfig.from_config(config).manifest.scheme == "w4a16"
    else:
        with pytest.raises(SettingsError, match=rf"vLLM 0\.25 to 0\.33; this is {version}"):
            LrqConfig.from_config(config)


@pytest.mark.parametrize(("ranks", "nearest"), [(4, "2 or 8"), (16, "8")])
def test_a_number_of_gpus_that_cannot_serve_is_refused_with_the_nearest_that_can(
    ranks: int, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import get_current_vllm_config

    monkeypatch.setattr(get_current_vllm_config().parallel_config, "tensor_parallel_size", ranks)
    with pytest.raises(SettingsError, match=rf"--tensor-parallel-size {ranks} cannot serve.*Use {nearest}\."):
        empty_layer(manifest_for("w4a16", OUTPUT))
    monkeypatch.setattr(get_current_vllm_config().parallel_config, "enable_expert_parallel", True)
    empty_layer(manifest_for("w4a16", OUTPUT))  # only experts may be in the way, and they are not cut


RANKS = {
    "all": {f"{PREFIX}.q_proj": 24, f"{PREFIX}.k_proj": 8, f"{PREFIX}.v_proj": 16, f"{PREFIX}.o_proj": 32},
    "some": {f"{PREFIX}.k_proj": 8, f"{PREFIX}.o_proj": 1},
}


@pytest.mark.parametrize("corrected", RANKS)
@pytest.mark.parametrize("modules", [QKV, OUTPUT], ids=["qkv", "o"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_correction_is_added_as_the_reference_says(scheme: str, modules: dict[str, tuple[int, int]], corrected: str) -> None:
    ranks = {module: rank for module, rank in RANKS[corrected].items() if module in modules}
    manifest = manifest_for(scheme, modules, correction=Correction(torch.bfloat16, ranks))
    loaded, without = loaded_layer(manifest), replace(manifest, correction=None)
    x = torch.randn(7, 256, dtype=torch.bfloat16) * 3
    y, expected = loaded.layer(x).float(), loaded.expected(x, None).float()
    assert (y - expected).norm() <= 6e-3 * expected.norm()
    tensors = {
        module: {suffix: tensor for suffix, tensor in of_module.items() if not suffix.startswith("low_rank")}
        for module, of_module in loaded.tensors.items()
    }
    uncorrected = torch.cat(reference_outputs(without, tensors, x), dim=1).float()
    assert (y - uncorrected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_an_input_is_rotated_before_anything_else_reads_it(scheme: str) -> None:
    name = f"{PREFIX}.o_proj"
    correction, hadamard = Correction(torch.bfloat16, {name: 32}), OnlineHadamard((name,), 128, 4)
    loaded = loaded_layer(manifest_for(scheme, OUTPUT, correction=correction, hadamard=hadamard))
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    expected = loaded.expected(x, None).float()
    assert (loaded.layer(x).float() - expected).norm() <= 6e-3 * expected.norm()
    loaded.manifest = manifest_for(scheme, OUTPUT, correction=correction)
    assert (loaded.expected(x, None).float() - expected).norm() > 0.5 * expected.norm()


def test_a_corrected_and_rotated_layer_compiles_whole_and_for_any_number_of_tokens() -> None:
    name = f"{PREFIX}.o_proj"
    correction, hadamard = Correction(torch.bfloat16, {name: 32}), OnlineHadamard((name,), 128, 4)
    loaded = loaded_layer(manifest_for("w4a4", OUTPUT, correction=correction, hadamard=hadamard))
    compiled = whole_graph(loaded.layer)
    for tokens in (3, 8):
        x = torch.randn(tokens, 256, dtype=torch.bfloat16)
        expected = loaded.expected(x, None).float()
        assert (compiled(x).float() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize("suffix", ["low_rank_u", "low_rank_v"])
def test_a_factor_that_never_comes_is_named(suffix: str) -> None:
    manifest = manifest_for("w4a8", QKV, correction=Correction(torch.bfloat16, dict.fromkeys(QKV, 8)))
    layer = empty_layer(manifest)
    tensors = {module: random_tensors(manifest, module) for module in manifest.quantized}
    del tensors[f"{PREFIX}.k_proj"][suffix]
    load(layer, tensors)
    with pytest.raises(CheckpointError, match=rf"k_proj\.{suffix} was not loaded"):
        layer.quant_method.process_weights_after_loading(layer)


def test_what_static_quantization_clips_is_counted_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_for("w8a8", OUTPUT)
    assert saturation.clipped_counts(loaded_layer(manifest).layer) == {}
    monkeypatch.setenv(saturation.VARIABLE, "1")
    model = torch.nn.Sequential(loaded_layer(manifest).layer)
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    x[0, :5], x[1] = 1000, 1000  # a sample: the first token of each step
    for run in (model, whole_graph(model)):
        run(x)
    assert saturation.clipped_counts(model) == {"0": (10, 512)}


def test_a_value_that_neither_asks_for_counts_nor_does_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(saturation.VARIABLE, "true")
    with pytest.raises(SettingsError, match=r"LRQ_SATURATION is 'true': give 1 to count what is clipped"):
        loaded_layer(manifest_for("w8a8", OUTPUT))


def test_other_schemes_have_no_calibrated_range_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(saturation.VARIABLE, "1")
    assert saturation.clipped_counts(loaded_layer(manifest_for("w4a8", OUTPUT)).layer) == {}


@pytest.mark.parametrize("served", [0, 10, 1000, None])
def test_the_first_columns_of_a_correction_are_served_when_asked_for(
    served: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRQ_CORRECTION_RANK", "" if served is None else str(served))  # empty, as Compose makes it: all
    ranks = {module: RANKS["all"][module] for module in QKV}
    loaded = loaded_layer(manifest_for("w4a16", QKV, correction=Correction(torch.bfloat16, ranks)))
    for tensors in loaded.tensors.values():
        for suffix in ("low_rank_u", "low_rank_v"):
            tensors[suffix][:, 1000 if served is None else served :] = 0
    x = torch.randn(7, 256, dtype=torch.bfloat16)
    expected = loaded.expected(x, None).float()
    assert (loaded.layer(x).float() - expected).norm() <= 6e-3 * expected.norm()


@pytest.mark.parametrize(("given", "said"), [("half", "whole number of columns"), ("8", "no low-rank correction")])
def test_a_rank_that_cannot_be_served_is_refused(given: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRQ_CORRECTION_RANK", given)
    with pytest.raises(SettingsError, match=said):
        empty_layer(manifest_for("w4a16", OUTPUT))


@pytest.mark.parametrize("name", ["LRQ_KERNEL", "LRQ_SATURATION", "LRQ_CORRECTION_RANK", "LRQ_TP_INVARIANT"])
def test_models_compiled_with_other_layers_are_told_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    from lrq_vllm.compilation_key import tell_apart

    hashes = []
    for value in ("", "1"):
        config = VllmConfig()
        monkeypatch.setenv(name, value)
        tell_apart(config)
        hashes.append(config.compute_hash())
    assert hashes[0] != hashes[1]
