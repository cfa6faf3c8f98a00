"""``lrq-offline export --to compressed-tensors``: the same integers, as another library and vLLM's own layers read them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_offline.cli import main
from lrq_offline.compressed_tensors_export import export_compressed_tensors, layer_form, quantization_config, why_not
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest, WeightFormat
from lrq_vllm.checkpoint.store import TensorFolder, read_config, read_manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels.reference import dequantize_weight
from tests.checkpoints import QUICK, TINY, with_16_bit_steps, write_random_model
from tests.vllm_layers import EXACT_BYTES, ROUNDS_ONCE, Tensors, load, random_tensors, reference_outputs

# Everything that can be exported: scheme, group size, symmetric.
FORMS = [
    ("w4a16", None, False), ("w4a16", 64, False), ("w4a16", None, True), ("w3a16", None, False), ("w2a16", 32, False),
    ("w8a8", None, True), ("w4a8", None, False),
]  # fmt: skip


def checkpoint(folder: Path, scheme: str, **settings: Any) -> Path:
    quantize_model(TINY, folder, QuantizeSettings(scheme, "rtn", **QUICK, **settings))
    return folder


def export(folder: Path, output: Path, *options: str) -> int:
    return main(["export", str(folder), "--to", "compressed-tensors", "-o", str(output), *options])


@pytest.fixture(scope="module")
def w4a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("w4a16") / "lrq", "w4a16")


def decoded(folder: Path, module: str) -> Tensor:
    """A module's weight, float32, as the compressed-tensors library reads it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(read_config(folder)["quantization_config"])
    tensors = TensorFolder(folder)
    names = [name for name in tensors if name.rpartition(".")[0] == module and not name.endswith((".bias", "input_scale"))]
    state = {name.removeprefix(f"{module}."): tensors.get(name) for name in names}
    state["weight_scale"] = state["weight_scale"].float()  # else the library multiplies in 16 bits
    compressor = BaseCompressor.get_value_from_registry(config.format)
    weight: Tensor = compressor.decompress(state, config.config_groups["group_0"])["weight"]
    return weight


@pytest.mark.parametrize(("scheme", "group_size", "symmetric"), FORMS)
def test_the_library_decodes_the_checkpoint_s_weights(
    scheme: str, group_size: int | None, symmetric: bool, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.17")
    folder = checkpoint(tmp_path / "lrq", scheme, group_size=group_size, symmetric=symmetric)
    if SCHEMES[scheme].activation is None:
        with_16_bit_steps(folder)
    assert export_compressed_tensors(folder, tmp_path / "out").step_change == 0
    manifest, stored, exported = read_manifest(folder), TensorFolder(folder), TensorFolder(tmp_path / "out")
    for module, (_, inputs) in manifest.quantized.items():
        layer = [stored.get(f"{module}.{part}") for part in ("qweight", "weight_step", "weight_zero_point")]
        expected = dequantize_weight(*layer, manifest.weight.bits, inputs)
        assert torch.equal(decoded(tmp_path / "out", module), expected)
        if scheme == "w8a8":
            assert torch.equal(exported.get(f"{module}.input_scale"), stored.get(f"{module}.input_step"))
            signed = stored.get(f"{module}.input_zero_point").int() - 128
            assert torch.equal(exported.get(f"{module}.input_zero_point").int(), signed)


def test_an_export_is_a_model_folder_with_all_else_as_it_was(w4a16: Path, tmp_path: Path) -> None:
    assert export(w4a16, tmp_path / "out", "--round-steps") == 0
    config = read_config(tmp_path / "out")
    assert config.pop("quantization_config")["ignore"] == list(read_manifest(w4a16).skipped)
    assert config == read_config(TINY)
    float_model, exported = TensorFolder(TINY), TensorFolder(tmp_path / "out")
    quantized = {f"{module}.weight" for module in read_manifest(w4a16).quantized}
    for name in set(float_model) - quantized:
        assert torch.equal(exported.get(name), float_model.get(name))
    parts = {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    assert set(exported) == set(float_model) - quantized | {f"{name}_{part[7:]}" for name in quantized for part in parts}
    assert not list((tmp_path / "out").glob("lrq_*")) and (tmp_path / "out" / "tokenizer.json").is_file()


def test_steps_are_rounded_only_when_asked(w4a16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(w4a16, tmp_path / "out") == 2
    refusal = capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    written = export_compressed_tensors(w4a16, tmp_path / "out", round_steps=True)
    assert 0 < written.step_change <= 2**-8  # half of bfloat16's last bit
    assert f"by up to {written.step_change:.2%}" in refusal and "--round-steps" in refusal
    name = "model.layers.0.mlp.up_proj.weight_"
    steps = TensorFolder(w4a16).get(f"{name}step")
    assert torch.equal(TensorFolder(tmp_path / "out").get(f"{name}scale"), steps.to(torch.bfloat16))


def test_a_step_that_16_bits_have_nothing_like_is_refused(w4a16: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(w4a16, tmp_path / "lrq")
    config = read_config(folder) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    with_16_bit_steps(folder, factor=1e-6)
    with pytest.raises(SettingsError, match="outside the range of float16"):
        export_compressed_tensors(folder, tmp_path / "out", round_steps=True)


@pytest.mark.parametrize(
    ("scheme", "settings", "reason"),
    [
        ("w8a8", {}, "--symmetric makes such"),
        ("w4a16", {"kv_bits": 8}, "8-bit keys and values"),
        ("w4a8", {"group_size": 64}, "with 16-bit activations only"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    scheme: str, settings: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "lrq", scheme, **settings)
    assert export(folder, tmp_path / "out", "--round-steps") == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lrq"]


@pytest.mark.parametrize(
    ("symmetric", "scheme", "works"), [(False, "w4a16", False), (True, "w4a16", True), (False, "w3a16", True)]
)
def test_zero_points_that_share_a_word_are_refused(symmetric: bool, scheme: str, works: bool) -> None:
    manifest = manifest_of(scheme, {"model.layers.0.self_attn.k_proj": (12, 64)}, symmetric=symmetric)
    assert (not why_not(manifest)) == works


def test_rounding_steps_of_a_dense_model_is_refused(w4a16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(w4a16), "--to", "dense", "--round-steps"]) == 2
    assert "a dense model has no steps" in capsys.readouterr().err


# --- vLLM's own layers, without the plugin ---

ATTENTION = "model.layers.0.self_attn"
QKV = {f"{ATTENTION}.q_proj": (256, 256), f"{ATTENTION}.k_proj": (128, 256), f"{ATTENTION}.v_proj": (128, 256)}
FUSED = {f"{ATTENTION}.qkv_proj": (512, 256)}  # as Phi-3's checkpoints have it
OUTPUT = {f"{ATTENTION}.o_proj": (256, 256)}


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("builds vLLM's layers on the CPU, which needs its CPU build")
    from vllm.config import VllmConfig

    from lrq_vllm.vllm_world import vllm_world

    with pytest.MonkeyPatch.context() as patch, vllm_world(VllmConfig(), torch.bfloat16):
        patch.setenv("VLLM_CPU_INT4_W4A8", "0")  # with AMX, vLLM would quantize the inputs of 4-bit weights
        yield


def manifest_of(
    scheme: str, modules: dict[str, tuple[int, int]], *, symmetric: bool, group_size: int | None = None
) -> Manifest:
    weight = WeightFormat(SCHEMES[scheme].weight_bits, symmetric, group_size)
    return Manifest(scheme, weight, modules, ("lm_head",), "test")


def stock_layer(manifest: Manifest, tensors: Tensors, bias: bool) -> Any:
    """vLLM's layer of an exported model, loaded as its engine does it."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("compressed-tensors").from_config(quantization_config(manifest))
    fused = manifest.quantized.keys() == FUSED.keys()
    config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]}
    options = {"bias": bias, "quant_config": config, "return_bias": False}
    if manifest.quantized.keys() == OUTPUT.keys():
        layer: Any = RowParallelLinear(256, 256, prefix=f"{ATTENTION}.o_proj", **options)
    else:
        layer = QKVParallelLinear(256, 64, 4, 2, prefix=f"{ATTENTION}.qkv_proj", **options)
    form = layer_form(manifest, torch.bfloat16)
    load(layer, {module: dict(form(module, parts)) for module, parts in tensors.items()})
    if bias:
        layer.bias.data.copy_(torch.randn_like(layer.bias))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.vllm
@pytest.mark.parametrize("modules", [QKV, FUSED, OUTPUT], ids=["qkv", "fused", "o"])
@pytest.mark.parametrize(
    ("scheme", "group_size", "symmetric"),
    [pytest.param(*form, marks=EXACT_BYTES) if form[0] == "w8a8" else form for form in FORMS],
)
@pytest.mark.usefixtures("world")
def test_vllm_s_own_layer_computes_what_the_reference_says(
    scheme: str, group_size: int | None, symmetric: bool, modules: dict[str, tuple[int, int]]
) -> None:
    manifest = manifest_of(scheme, modules, symmetric=symmetric, group_size=group_size)
    tensors = {module: random_tensors(manifest, module) for module in modules}
    for parts in tensors.values():
        if manifest.activation is None:
            parts["weight_step"] = parts["weight_step"].bfloat16().float()
        if symmetric:
            parts["weight_zero_point"].fill_(1 << (manifest.weight.bits - 1))
    layer = stock_layer(manifest, tensors, bias=modules is not OUTPUT)
    assert type(layer.quant_method).__name__ == "CompressedTensorsLinearMethod"
    x = torch.randn(7, 256, dtype=torch.bfloat16) * 3  # so that a static range clips
    expected = torch.cat(reference_outputs(manifest, tensors, x), dim=-1).float()
    if layer.bias is not None:
        expected += layer.bias.float()
    # bfloat16 keeps 8 bits of a sum to which a bias is added; without one the integers are the same, and so are the bits.
    rounds_once = ROUNDS_ONCE or manifest.activation is not None
    assert (layer(x).float() - expected).norm() <= (4e-3 if rounds_once else 8e-3) * expected.norm()


def test_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "experts"
    quantize_model(write_random_model("mixtral", tmp_path / "float"), made, QuantizeSettings("w4a16", "rtn", **QUICK))
    assert export(made, tmp_path / "out") == 2
    assert "it has experts" in capsys.readouterr().err and not (tmp_path / "out").exists()
