"""Runs that go on: for more steps, from another folder, on data or models that changed; and never two in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import semantic_routing.training.loop as module
from semantic_routing.checkpoint.load import EMA, MODEL, OPTIMIZER, STATE, find_checkpoint, read_state
from semantic_routing.cli.main import main
from semantic_routing.common.errors import Interrupted
from semantic_routing.data.dataset import DataConfig
from semantic_routing.sampling.load import load_bundle
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import resume, start
from semantic_routing.training.optim import OptimConfig

Make = Callable[..., TrainConfig]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{file}:{name}": x for file in (MODEL, EMA, OPTIMIZER) for name, x in load_file(checkpoint / file).items()}


def assert_same(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def stop_at(step: int, number: signal.Signals = signal.SIGTERM) -> Callable[[int], None]:
    return lambda finished: signal.raise_signal(number) if finished == step else None


def begin(cfg: TrainConfig, out: Path, step: int = 2) -> None:
    """Train and be stopped."""
    with pytest.raises(Interrupted):
        start(cfg, out, stop_at(step))


def photos(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.new("RGB", (40, 36), (i * 20, 90, 30)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(line for line in capsys.readouterr().err.splitlines(True) if line.startswith("semroute: "))


# --- more steps ---


@pytest.mark.behaviour(
    "Training",
    when="a finished run is resumed with --steps N",
    then="it trains up to step N, bitwise like a run of N steps if the learning rate does not depend on the end",
)
@pytest.mark.parametrize("optim", [OptimConfig(lr=1e-2), OptimConfig(name="muon", lr=1e-2, muon_lr=0.02, warmup=3)])
def test_a_run_that_is_extended_is_one_that_was_longer(tiny_config: Make, tmp_path: Path, optim: OptimConfig) -> None:
    whole = start(tiny_config(steps=6, optim=optim), tmp_path / "whole")
    start(tiny_config(steps=3, optim=optim), tmp_path / "run")
    assert_same(whole, resume(tmp_path / "run", steps=6))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 6
    assert read_state(find_checkpoint(tmp_path / "run"))["config"]["steps"] == 6


def test_an_extension_that_was_stopped_goes_on_to_its_end(tiny_config: Make, tmp_path: Path) -> None:
    """Also where it was killed before it wrote a checkpoint."""
    run, killed = tmp_path / "run", tmp_path / "killed"
    start(tiny_config(steps=3), run)
    shutil.copytree(run, killed)
    with pytest.raises(Interrupted):
        resume(run, stop_at(5), steps=6)
    shutil.copy(run / "config.json", killed / "config.json")
    assert_same(resume(run), resume(killed))
    assert read_state(find_checkpoint(killed))["step"] == 6


@pytest.mark.parametrize(("decay", "factor"), [("cosine", "0.5 of its peak instead of 0"), ("linear", "0.5 of its")])
def test_a_schedule_that_depends_on_the_end_is_told(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], decay: str, factor: str
) -> None:
    start(tiny_config(steps=2, optim=OptimConfig(lr=1e-2, decay=decay)), tmp_path / "run")
    resume(tmp_path / "run", steps=4)
    told = said(capsys)
    assert f"the {decay} decay of the learning rate now ends at step 4 instead of 2" in told
    assert factor in told


@pytest.mark.behaviour(
    "Training",
    when="a run is resumed after its config.json was edited",
    then="a changed number of steps is used, and a message says that all other edits are ignored",
)
def test_an_edited_configuration_is_noticed(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(tiny_config(steps=2), run)
    path = run / "config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"batch": 8}, "config.json was edited; the edits of batch are ignored, "),
        ({"optim": config["optim"] | {"lr": 1.0}}, "config.json was edited; the edits of optim.lr are ignored, "),
        (
            {"steps": 1},
            "config.json says 1 steps: ignored, because step 2 is already done; the run continues to step 2",
        ),
        (
            {"btach": 8},
            "config.json is ignored, because a run takes its settings from its checkpoint: unknown setting ",
        ),
    ):
        path.write_text(json.dumps(config | change))
        resume(run)
        assert words in said(capsys)
        assert read_state(find_checkpoint(run))["step"] == 2
    path.write_text("{")
    resume(run)
    assert "config.json is not JSON" in said(capsys)
    path.write_text(json.dumps(config | {"steps": 4}))
    resume(run)
    assert "config.json says 4 steps: the run continues to that step instead of step 2" in said(capsys)
    assert read_state(find_checkpoint(run))["step"] == 4
    resume(run)
    assert said(capsys) == ""


def test_what_resuming_takes_is_said_where_something_else_is_given(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (["--optim.lr", "1"], ["--out", "x"], ["--batch=8", "--steps", "9"]):
        with pytest.raises(SystemExit):
            main(["train", "--resume", str(tiny_run), *wrong])
        assert "--steps N, to train up to step N, and --accept-changes" in capsys.readouterr().err


# --- the same data, the same models ---


@pytest.mark.behaviour(
    "Training",
    when="a run is resumed after images were added or replaced, or captions, a sidecar, the text encoder or the VAE",
    then="one line says what changed and stops; --accept-changes resumes anyway",
)
@pytest.mark.parametrize("what", ["added", "taken away", "other pictures", "other captions"])
def test_other_data_are_refused(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    data, run = photos(tmp_path / "photos", 6), tmp_path / "run"
    begin(tiny_config(data=DataConfig(paths=(str(data),)), steps=4), run)
    if what == "added":
        photos(data, 2, first=6)
    elif what == "taken away":
        (data / "3.png").unlink()
        (data / "3.txt").unlink()
    elif what == "other pictures":
        Image.new("RGB", (40, 36), "white").save(data / "5.png")
    else:
        (data / "0.txt").write_text("another text")
    told = {"added": "holds 8 records instead of 6", "taken away": "holds 5 records instead of 6"}
    change = f"{data} {told.get(what, f'holds {what}')}"
    before = sorted((run / "checkpoints").rglob("*"))
    with pytest.raises(
        ValueError, match=f"{run} was started on other data or models: {data} {told.get(what, f'holds {what}')}"
    ):
        resume(run)
    assert sorted((run / "checkpoints").rglob("*")) == before
    main(["train", "--resume", str(run), "--accept-changes"])
    assert f"resuming although {change}" in said(capsys)
    resume(run)  # what was accepted is what counts from then on


def test_another_sidecar_is_refused(tiny_config: Make, tmp_path: Path) -> None:
    data, sidecar = photos(tmp_path / "photos", 3), tmp_path / "new.jsonl"

    def write(text: str) -> None:
        rows = [{"key": f"{i}.png", "caption": f"{text} {i}"} for i in range(3)]
        sidecar.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("a picture")
    begin(tiny_config(data=DataConfig(paths=(str(data),), sidecar=str(sidecar)), steps=4), tmp_path / "run")
    write("no longer the picture")
    with pytest.raises(ValueError, match="holds other captions"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("what", ["weights", "words"])
def test_another_text_encoder_behind_the_same_path_is_refused(
    tiny_config: Make, tiny_encoder: Path, tmp_path: Path, what: str
) -> None:
    encoder, cfg = tmp_path / "encoder", tiny_config(steps=4)
    shutil.copytree(tiny_encoder, encoder)
    begin(replace(cfg, text=replace(cfg.text, name_or_path=str(encoder))), tmp_path / "run")
    if what == "weights":
        weights = load_file(encoder / "model.safetensors")
        save_file({name: x * 1.1 for name, x in weights.items()}, encoder / "model.safetensors", {"format": "pt"})
    else:
        tokenizer = json.loads((encoder / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
        (encoder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="the text encoder is a different one"):
        resume(tmp_path / "run")


def test_data_that_only_moved_or_were_touched_are_the_same(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = photos(tmp_path / "photos", 5)
    begin(tiny_config(data=DataConfig(paths=(str(data),)), steps=4), tmp_path / "run")
    for path in data.iterdir():
        os.utime(path, (1, 1))
    shutil.copytree(data, tmp_path / "copy")
    shutil.rmtree(data)
    data.symlink_to(tmp_path / "copy")
    resume(tmp_path / "run")
    assert said(capsys) == ""


def test_a_run_of_an_earlier_version_goes_on(tiny_config: Make, tmp_path: Path) -> None:
    data, run = photos(tmp_path / "photos", 5), tmp_path / "run"
    begin(tiny_config(data=DataConfig(paths=(str(data),)), steps=4), run)
    path = find_checkpoint(run) / STATE
    state = json.loads(path.read_text())
    del state["origins"]
    path.write_text(json.dumps(state))
    photos(data, 2, first=5)
    assert read_state(resume(run))["origins"]["data"][0]["records"] == 7


@pytest.mark.behaviour(
    "Training",
    when="a run that was given relative paths is resumed or sampled from another folder",
    then="they are relative to the folder where it was started, and resuming says so",
)
def test_relative_paths_are_those_of_the_start(
    tiny_config: Make, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here, there = tmp_path / "a", tmp_path / "b"
    photos(here / "photos", 4)
    photos(there / "photos", 9)  # of the same name, and another's
    shutil.copytree(tiny_encoder, here / "models" / "lm")
    monkeypatch.chdir(here)
    text = TextEncoderConfig(name_or_path="models/lm", buckets=(16, 32, 64))
    cfg = tiny_config(data=DataConfig(paths=("photos",)), text=text, steps=4)
    whole = start(cfg, Path("whole"))
    begin(cfg, Path("run"))
    monkeypatch.chdir(there)
    assert_same(here / whole, resume(here / "run"))
    assert f"the run was started in another folder, {here}: relative paths start there" in said(capsys)
    assert read_state(find_checkpoint(here / "run"))["config"]["data"]["paths"] == ["photos"]
    assert load_bundle(here / "run", torch.device("cpu")).encoder.shape.width == 64
    monkeypatch.chdir(here)
    resume(Path("run"))
    assert said(capsys) == ""


def test_a_project_that_moved_as_a_whole_goes_on(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "old" / "photos", 4)
    monkeypatch.chdir(tmp_path / "old")
    begin(tiny_config(data=DataConfig(paths=("photos",)), steps=3), Path("run"))
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    assert read_state(resume(Path("run")))["step"] == 3


# --- one writer, and nobody else's files ---


@pytest.mark.behaviour(
    "Training",
    when="a second process trains into a run's folder",
    then="one line names host and process of the first, which continues",
)
def test_a_second_writer_is_refused(tiny_config: Make, tmp_path: Path) -> None:
    run, cfg, refused = tmp_path / "run", tiny_config(steps=5, checkpoint_every=2), []

    def second(step: int) -> None:
        """At each step the run is begun again, and from its first checkpoint on also resumed."""
        for act in (lambda: start(cfg, run), *([lambda: resume(run)] if (run / "checkpoints").exists() else [])):
            with pytest.raises(ValueError, match=f"{run} is in use: process {os.getpid()} on host ") as error:
                act()
            refused.append(error)

    assert_same(start(cfg, run, second), start(cfg, tmp_path / "alone"))
    assert len(refused) > 5
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert resume(run).name == "step-0000005"  # the lock went with the run


@pytest.mark.behaviour(
    "Training",
    when="--out is a folder with the user's own files that have the names of a run's files",
    then="the command stops, and they are not changed",
)
@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", '[{"image": "1.jpg", "text": "a cat"}]'), ("config.json", "{}"), ("metrics.jsonl", "mine\n")],
)
def test_files_of_others_are_never_replaced(tiny_config: Make, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} exists and does not belong to a run"):
        start(tiny_config(), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: content}


def test_a_language_model_of_others_is_never_replaced(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "training_corpus", lambda data: [f"a {i} circle" for i in range(40)])
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    cfg = tiny_config(steps=1)
    cfg = replace(cfg, text=replace(cfg.text, name_or_path="tiny:2x64x1"))
    (tmp_path / "mine" / "text_encoder").mkdir(parents=True)
    (tmp_path / "mine" / "text_encoder" / "weights").write_text("mine")
    with pytest.raises(ValueError, match="text_encoder exists and is not the language model of this run"):
        start(cfg, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["text_encoder", "weights"]
    (made,) = (tmp_path / "cache").iterdir()
    shutil.copytree(made, tmp_path / "begun" / "text_encoder")  # as of a run that died at once
    start(cfg, tmp_path / "begun")
