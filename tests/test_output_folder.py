"""The output folder: what is refused, that it appears whole or not at all, and what is kept of a run that was stopped."""

import json
from pathlib import Path

import pytest

from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_offline.progress import Progress
from lrq_vllm.checkpoint.schema import Manifest, WeightFormat
from lrq_vllm.errors import SettingsError


def quantized_folder(folder: Path) -> Path:
    folder.mkdir()
    manifest = Manifest("w4a16", WeightFormat(4), {"m": (2, 64)}, (), "0.1.0")
    (folder / "config.json").write_text(json.dumps({"quantization_config": manifest.to_dict()}))
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


# --- what may be an output ---


@pytest.mark.parametrize("output", [".", "..", "../../models/tiny"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_holds_the_model_is_refused(model: Path, output: str, overwrite: bool) -> None:
    with pytest.raises(SettingsError, match="is or contains the model"):
        check_output(model / output, model, overwrite=overwrite)


def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(SettingsError, match="out exists and is a file"):
        check_output(tmp_path / "out", model, overwrite=True)


def test_an_output_with_something_in_it_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"out exists and is not empty.*--overwrite"):
        check_output(quantized_folder(tmp_path / "out"), model, overwrite=False)


@pytest.mark.parametrize("config", [None, "{}", "no JSON", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_overwriting_stops_at_what_is_no_checkpoint_of_ours(model: Path, tmp_path: Path, config: str | None) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").touch()
    if config is not None:
        (output / "config.json").write_text(config)
    with pytest.raises(SettingsError, match="out holds something other than an LRQ checkpoint"):
        check_output(output, model, overwrite=True)


def test_a_new_an_empty_and_an_overwritable_output_are_accepted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "new", model, overwrite=False)
    check_output(tmp_path / "empty", model, overwrite=False)
    check_output(quantized_folder(tmp_path / "out"), model, overwrite=True)


# --- whole or not at all ---


def test_a_new_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with new_folder(output) as folder:
        (folder / "a").write_text("new")
        assert not output.exists()
    assert files_of(output.parent) == ["out"] and files_of(output) == ["a"]


def test_a_new_folder_leaves_nothing_behind_on_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert files_of(tmp_path) == []


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    output = quantized_folder(tmp_path / "out")
    with new_folder(output) as folder:
        (folder / "a").write_text("new")
    assert files_of(tmp_path) == ["out"] and files_of(output) == ["a"]


def test_the_old_folder_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    output = quantized_folder(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(output):
        raise ZeroDivisionError
    assert files_of(tmp_path) == ["out"] and files_of(output) == ["config.json"]


def test_the_old_folder_is_put_back_when_a_run_was_killed_while_replacing_it(tmp_path: Path) -> None:
    quantized_folder(tmp_path / ".out.replaced")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert files_of(tmp_path) == ["out"] and files_of(tmp_path / "out") == ["config.json"]


def test_what_a_killed_run_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00002.partial").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert files_of(tmp_path) == ["out"] and files_of(tmp_path / "out") == ["a"]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="file/out cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass


def test_a_link_to_an_empty_folder_can_be_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    check_output(tmp_path / "out", model, overwrite=False)
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert files_of(tmp_path / "out") == ["a"]


def test_the_current_folder_can_be_filled_when_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with new_folder(Path(".")) as folder:
        (folder / "a").touch()
    assert files_of(tmp_path / "out") == ["a"]


def test_two_runs_never_write_the_same_output(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("the first's")
        for restart in (False, True):
            with (
                pytest.raises(SettingsError, match=r"Another run is writing .*out"),
                new_folder(tmp_path / "out", restart=restart),
            ):
                pass
    assert files_of(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == "the first's"


def test_what_appeared_at_the_output_meanwhile_is_not_replaced_and_the_work_stays(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def work() -> None:
        with new_folder(output, check=lambda: check_output(output, model, overwrite=False)) as folder:
            progress = Progress(folder, RUN)
            if not progress.finished:
                progress.record({"block": 1})
                output.mkdir()
                (output / "thesis.tex").touch()

    with pytest.raises(SettingsError, match="out exists and is not empty"):
        work()
    assert files_of(output) == ["thesis.tex"]
    (output / "thesis.tex").unlink()
    work()
    assert files_of(output) == []  # the result, whose notes are gone


def test_a_result_that_cannot_be_moved_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, target: Path) -> None:
        raise OSError("Device or resource busy")

    with (
        pytest.raises(SettingsError, match=r"resource busy\). It is whole in .*\.out\.partial"),
        new_folder(tmp_path / "out") as folder,
    ):
        Progress(folder, RUN).record({"block": 1})
        (folder / "shard").touch()
        monkeypatch.setattr(Path, "rename", busy)
    assert files_of(tmp_path / ".out.partial") == ["shard"]


def test_a_disk_that_is_mounted_is_no_output(model: Path) -> None:
    with pytest.raises(SettingsError, match="is where a disk is mounted"):
        check_output(Path("/proc"), model, overwrite=False)


def test_a_file_missing_elsewhere_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source\.json"), new_folder(tmp_path / "out"):
        (tmp_path / "source.json").read_text()


# --- unfinished runs ---

RUN = {"seed": 0}


def stop_after_blocks(output: Path, blocks: int) -> None:
    """A run that finishes some blocks and is then stopped."""
    with pytest.raises(KeyboardInterrupt), new_folder(output) as folder:
        progress = Progress(folder, RUN)
        for block in range(blocks):
            (folder / f"shard-{block}").touch()
            progress.record({"block": block + 1})
        raise KeyboardInterrupt


def test_finished_blocks_are_there_again_the_next_time(tmp_path: Path) -> None:
    stop_after_blocks(tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as folder:
        progress = Progress(folder, RUN)
        assert progress.finished == [{"block": 1}, {"block": 2}]
        assert {"shard-0", "shard-1"} <= set(files_of(folder))
    assert files_of(tmp_path) == ["out"] and files_of(tmp_path / "out") == ["shard-0", "shard-1"]


def test_a_run_that_finished_no_block_leaves_nothing(tmp_path: Path) -> None:
    stop_after_blocks(tmp_path / "out", 0)
    assert files_of(tmp_path) == []


def test_restarting_throws_finished_blocks_away(tmp_path: Path) -> None:
    stop_after_blocks(tmp_path / "out", 2)
    with new_folder(tmp_path / "out", restart=True) as folder:
        assert files_of(folder) == []


def test_an_unfinished_run_and_the_old_result_stand_side_by_side(tmp_path: Path) -> None:
    output = quantized_folder(tmp_path / "out")
    stop_after_blocks(output, 1)
    assert files_of(output) == ["config.json"]
    with new_folder(output) as folder:
        Progress(folder, RUN)
    assert files_of(tmp_path) == ["out"] and files_of(output) == ["shard-0"]


def test_a_run_that_is_refused_for_its_settings_keeps_the_finished_blocks(tmp_path: Path) -> None:
    stop_after_blocks(tmp_path / "out", 2)
    with (
        pytest.raises(SettingsError, match=r"differs from it in seed \(was 0, now 1\)"),
        new_folder(tmp_path / "out") as folder,
    ):
        Progress(folder, {"seed": 1})
    with new_folder(tmp_path / "out") as folder:
        assert len(Progress(folder, RUN).finished) == 2


# --- what is carried over ---


def test_all_but_weights_checkpoints_and_hidden_files_is_carried_over_and_nothing_replaced(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "LICENSE", ".gitattributes", "model.safetensors", "model.safetensors.index.json", "a.bin"):
        (model / name).write_text("old")
    (model / "original").mkdir()
    (model / "original" / "consolidated.pth").touch()
    (model / "original" / "params.json").touch()
    target = quantized_folder(tmp_path / "out")
    written = (target / "config.json").read_text()
    (model / "original" / "gone").symlink_to(tmp_path / "nothing")
    for made in (model / "earlier", model / "original" / "earlier"):
        quantized_folder(made)
        (made / "lrq_seal.json").touch()
    carry_over(model, target)
    assert files_of(target) == ["LICENSE", "config.json", "original", "tokenizer.json"]
    assert files_of(target / "original") == ["params.json"]
    assert (target / "config.json").read_text() == written
