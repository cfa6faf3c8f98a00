"""lrq-offline from end to end on the tiny model: what it writes, how good it is, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lrq_offline.calibration_text import shipped_calibration
from lrq_offline.cli import main
from lrq_offline.config import QuantizeSettings
from lrq_offline.evaluate import Quality, evaluate_folder
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint import TensorFolder, read_manifest
from tests.checkpoints import HELDOUT, QUICK, SCHEMES, TINY, Checkpoints

QUICK_OPTIONS = ("--iters", "2", "--samples", "2", "--seq-len", "32")


@pytest.mark.parametrize("scheme", ["w4a16", "w3a16", "w4a8"])
def test_lrq_beats_round_to_nearest_on_heldout_text(checkpoints: Checkpoints, scheme: str) -> None:
    def quality(method: str) -> Quality:
        return evaluate_folder(checkpoints(scheme, method), HELDOUT, reference=TINY, windows=8)

    learned, rounded = quality("lrq"), quality("rtn")
    assert learned.kl is not None and rounded.kl is not None
    assert learned.kl < rounded.kl
    assert learned.perplexity < rounded.perplexity


@pytest.mark.parametrize(("scheme", "most"), [("w8a8", 0.52), ("w4a8", 0.30), ("w4a16", 0.30), ("w3a16", 0.22)])
def test_quantized_linears_are_small(checkpoints: Checkpoints, scheme: str, most: float) -> None:
    folder = checkpoints(scheme, "lrq")
    stored, source = TensorFolder(folder), TensorFolder(TINY)
    modules = read_manifest(folder).quantized
    stored_bytes = sum(stored.get(name).nbytes for name in stored if name.rpartition(".")[0] in modules)
    assert stored_bytes <= most * sum(source.get(f"{module}.weight").nbytes for module in modules)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_of_every_block_is_quantized(checkpoints: Checkpoints, scheme: str) -> None:
    manifest = read_manifest(checkpoints(scheme, "lrq"))
    assert len(manifest.quantized) == 7 * 4
    assert manifest.skipped == ("lm_head",)


def test_what_is_not_quantized_stays_byte_identical(checkpoints: Checkpoints) -> None:
    folder = checkpoints("w4a16", "lrq")
    before, after = TensorFolder(TINY), TensorFolder(folder)
    kept = [name for name in before if name.removesuffix(".weight") not in read_manifest(folder).quantized]
    assert "model.embed_tokens.weight" in kept
    for name in kept:
        assert after.get(name).dtype == before.get(name).dtype
        assert torch.equal(after.get(name).view(torch.uint8), before.get(name).view(torch.uint8))


def test_tied_embeddings_stay_tied(checkpoints: Checkpoints) -> None:
    assert "lm_head.weight" not in TensorFolder(checkpoints("w4a16", "lrq"))


def test_other_files_are_carried_over(checkpoints: Checkpoints) -> None:
    folder = checkpoints("w4a16", "lrq")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (TINY / name).read_bytes()


def test_linears_that_a_server_fuses_share_one_activation_step(checkpoints: Checkpoints) -> None:
    tensors = TensorFolder(checkpoints("w8a8", "lrq"))
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for suffix in ("input_step", "input_zero_point"):
            assert len({tensors.get(f"model.layers.1.{name}.{suffix}").item() for name in group}) == 1


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        quantize_model(TINY, tmp_path / name, QuantizeSettings(scheme="w4a8", **QUICK))
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("--scheme", "w4a16", "--symmetric"),
        ("--scheme", "w4a16", "--group-size", "64"),
        ("--scheme", "w3a16", "--method", "flexround"),
        ("--scheme", "w3a16", "--rank", "4"),
        ("--scheme", "w3a16", "--rank", "full"),
        ("--scheme", "w3a16", "--renew"),
        ("--scheme", "w2a16", "--group-size", "32"),
        ("--scheme", "w4a8", "--kv-bits", "8"),
        ("--scheme", "w4a8", "--method", "gptq"),
        ("--scheme", "w8a8", "--method", "gptq"),
        ("--scheme", "w4a16", "--method", "smoothquant-rtn"),
        ("--scheme", "w8a8", "--max-gpu-gb", "0"),
    ],
    ids=" ".join,
)
def test_options_give_a_checkpoint_that_evaluates(tmp_path: Path, options: tuple[str, ...]) -> None:
    output = tmp_path / "out"
    assert main(["quantize", str(TINY), "-o", str(output), *QUICK_OPTIONS, *options]) == 0
    assert evaluate_folder(output, HELDOUT, windows=1, seq_len=64).perplexity < 1000


@pytest.mark.parametrize(("loss", "weighs"), [("fisher", True), ("mse", False)])
def test_the_pass_before_the_first_block_is_told_of(
    loss: str, weighs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--scheme", "w4a16", "--loss", loss)
    assert main(["quantize", str(TINY), "-o", str(tmp_path / "out"), *QUICK_OPTIONS, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [place for place, line in enumerate(lines) if line.startswith("weighing errors: 2 windows")]
    first_block = next(place for place, line in enumerate(lines) if line.startswith("block 1/"))
    assert len(told) == weighs and all(place < first_block for place in told)


def test_evaluation_text_that_is_learned_from_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for calibration, seen in ((HELDOUT, True), (shipped_calibration(), False)):
        output = tmp_path / str(seen)
        options = ["--method", "rtn", "--scheme", "w4a16", "--calibration", str(calibration), "--eval-text", str(HELDOUT)]
        assert main(["quantize", str(TINY), "-o", str(output), *QUICK_OPTIONS, *options]) == 0
        assert ("100% of the evaluation text" in capsys.readouterr().out) == seen


def test_gptq_beats_round_to_nearest_on_heldout_text(checkpoints: Checkpoints) -> None:
    compensated, rounded = (
        evaluate_folder(checkpoints("w3a16", method), HELDOUT, reference=TINY, windows=8) for method in ("gptq", "rtn")
    )
    assert compensated.kl is not None and rounded.kl is not None
    assert compensated.kl < 0.9 * rounded.kl


def test_eight_bit_keys_and_values_cost_a_little(checkpoints: Checkpoints) -> None:
    plain, quantized = (
        evaluate_folder(checkpoints("w4a16", "rtn"), HELDOUT, reference=TINY, windows=4, kv_bits=bits) for bits in (None, 8)
    )
    assert quantized.perplexity != plain.perplexity
    assert quantized.perplexity == pytest.approx(plain.perplexity, rel=0.02)


def test_a_checkpoint_that_asks_for_8_bit_keys_and_values_is_evaluated_with_them(tmp_path: Path) -> None:
    found = {}
    for bits in (None, 8):
        quantize_model(TINY, tmp_path / f"{bits}", QuantizeSettings("w4a16", "rtn", kv_bits=bits, **QUICK))
        found[bits] = evaluate_folder(tmp_path / f"{bits}", HELDOUT, windows=2).perplexity
    assert read_manifest(tmp_path / "8").kv_bits == 8
    assert found[8] == evaluate_folder(tmp_path / "None", HELDOUT, windows=2, kv_bits=8).perplexity != found[None]


def test_an_explicit_option_wins_over_the_preset(tmp_path: Path) -> None:
    options = ("--scheme", "w4a16", "--preset", "fast", "--method", "rtn", "--samples", "3", "--seq-len", "40")
    assert main(["quantize", str(TINY), "-o", str(tmp_path / "out"), *options]) == 0
    settings = json.loads((tmp_path / "out" / "lrq_report.json").read_text())["settings"]
    assert (settings["iters"], settings["samples"], settings["seq_len"]) == (200, 3, 40)


def test_a_report_page_is_made_of_a_quantization(checkpoints: Checkpoints, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(checkpoints("w4a16", "lrq")), "-o", str(page)]) == 0
    assert "self_attn.q_proj" in page.read_text()


def test_evaluation_tells_how_sure_it_is(checkpoints: Checkpoints) -> None:
    quality = evaluate_folder(checkpoints("w3a16", "rtn"), HELDOUT, reference=TINY, windows=8, seq_len=128)
    assert quality.kl is not None and quality.kl_low is not None and quality.kl_high is not None
    assert quality.kl_low < quality.kl < quality.kl_high


def test_evaluate_prints_the_quality_as_json(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--reference", str(TINY), "--text", str(HELDOUT), "--windows", "2", "--seq-len", "64", "--json"]
    assert main(["evaluate", str(checkpoints("w4a16", "lrq")), *arguments]) == 0
    quality = json.loads(capsys.readouterr().out)
    assert quality["tokens"] == 2 * 63
    assert 0 < quality["kl"] < 1


def test_inspect_names_every_layer(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoints("w3a16", "rtn")
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    for module in read_manifest(folder).quantized:
        assert module in printed


def test_biases_an_untied_head_and_many_shards_survive(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    source, output = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, source / name)
    assert len(list(source.glob("*.safetensors"))) > 1
    quantize_model(source, output, QuantizeSettings(scheme="w8a8", method="rtn", **QUICK))
    assert torch.equal(TensorFolder(output).get("lm_head.weight"), model.lm_head.weight)
    kl = evaluate_folder(output, HELDOUT, reference=source, windows=2, seq_len=64).kl
    assert kl is not None and kl < 1e-3


# Bad input: exit code 2, one paragraph that names the cause, and nothing written.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(TINY, tmp_path / "model")


def refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run quantize on arguments that cannot work, check that nothing was left, and return the message."""
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["quantize", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lrq-offline: ")
    assert message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return message


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def quick(model: Path, tmp_path: Path, *options: str) -> list[str]:
    return [str(model), "-o", str(tmp_path / "out"), "--scheme", "w4a16", *QUICK_OPTIONS, *options]


def test_a_missing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refused(quick(tmp_path / "absent", tmp_path), tmp_path, capsys)


def test_a_missing_config_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").unlink()
    assert "has no config.json" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_another_family_is_refused_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, model_type="mamba")
    message = refused(quick(model, tmp_path), tmp_path, capsys)
    assert "mamba" in message and "llama" in message


def test_foreign_code_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, model_type="mamba", auto_map={"AutoModelForCausalLM": "modeling.Custom"})
    assert "trust_remote_code" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_code_in_the_folder_of_a_known_family_is_not_run_and_not_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "modeling.py").write_text("raise SystemExit('it ran')")
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling.Custom"}, quantization_config=None)
    assert main(["quantize", *quick(model, tmp_path)]) == 0
    assert "taken for an ordinary llama" in capsys.readouterr().out
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_config_of_no_model_and_a_stray_tensor_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "v_head.summary.weight": torch.zeros(1, 2)}, model / "model.safetensors")
    assert "tensor v_head.summary.weight is no part of the model" in refused(quick(model, tmp_path), tmp_path, capsys)
    save_file(tensors, model / "model.safetensors")
    edit_config(model, hidden_act="sillu")
    assert "transformers cannot build the llama model" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_pickled_weights_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickle (pytorch_model.bin)" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_truncated_weights_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors is not a complete safetensors file" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_nan_weights_are_refused_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.2.mlp.up_proj.weight holds NaN" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_a_missing_tensor_is_refused_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight is missing" in refused(quick(model, tmp_path), tmp_path, capsys)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_integers_in_place_of_floats_are_refused(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = (tensors[name] * 10).to(torch.int8)
    save_file(tensors, model / "model.safetensors")
    assert f"tensor {name} holds int8, not floats" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_windows_longer_than_the_model_reads_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(model, max_position_embeddings=63)
    assert "made for texts of 63 tokens" in refused(quick(model, tmp_path, "--seq-len", "64"), tmp_path, capsys)
    assert main(["evaluate", str(model), "--text", str(HELDOUT), "--windows", "1", "--seq-len", "64"]) == 2
    assert "--seq-len is 64" in " ".join(capsys.readouterr().err.split())
    edit_config(model, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert main(["quantize", *quick(model, tmp_path, "--seq-len", "64", "--method", "rtn")]) == 0


def test_a_config_that_does_not_fit_the_weights_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(model, intermediate_size=512)
    assert "config.json implies [512, 256]" in refused(quick(model, tmp_path), tmp_path, capsys)


def test_a_full_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "is not empty" in refused(quick(TINY, tmp_path), tmp_path, capsys)
    assert "other than an LRQ checkpoint" in refused(quick(TINY, tmp_path, "--overwrite"), tmp_path, capsys)
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_too_short_a_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Not much to learn from.")
    message = refused(quick(TINY, tmp_path, "--calibration", str(tmp_path / "short.txt")), tmp_path, capsys)
    assert "tokens" in message and "--samples" in message


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(quick(TINY, tmp_path, "--group-size", "96"), tmp_path, capsys)
    assert "96 does not divide the 256 inputs of model.layers.0.self_attn.q_proj" in message


def test_an_unknown_scheme_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(TINY), "--scheme", "w5a5"])
    assert stopped.value.code == 2
    assert "w4a16" in capsys.readouterr().err


def test_a_quantized_model_is_not_quantized_again(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "already quantized" in refused(quick(checkpoints("w4a16", "rtn"), tmp_path), tmp_path, capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--windows", "0"], "--windows is 0"),
        (["--windows", "-2"], "--windows is -2"),
        (["--seq-len", "1"], "--seq-len is 1"),
        (["--reference", "{other}"], "it is another model"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_paragraph(
    options: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(model, vocab_size=99)
    options = [option.format(other=model) for option in options]
    assert main(["evaluate", str(TINY), "--text", str(HELDOUT), *options]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_tokens_that_the_model_does_not_know_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 64
    tensors = load_file(model / "model.safetensors")
    cut = {name: tensor[:rows] if "embed" in name or "lm_head" in name else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in cut.items()}, model / "model.safetensors")
    edit_config(model, vocab_size=rows)
    assert "a model that knows 64" in refused(quick(model, tmp_path), tmp_path, capsys)
    assert main(["evaluate", str(model), "--text", str(HELDOUT), "--windows", "1"]) == 2
    assert "a model that knows 64" in capsys.readouterr().err
