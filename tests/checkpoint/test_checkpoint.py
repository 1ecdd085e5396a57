"""Checkpoints: restored exactly, skipped if damaged, and refused by another model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from semantic_routing.checkpoint.load import (
    EMA,
    MODEL,
    OPTIMIZER,
    RANDOM,
    STATE,
    checkpoints,
    find_checkpoint,
    load_training_state,
    load_weights,
    read_state,
)
from semantic_routing.checkpoint.save import Saver
from semantic_routing.training.optim import OptimConfig, make_optimizers
from tests.helpers.checkpoints import Net, files, save_checkpoint, train, trained


def test_a_loaded_checkpoint_continues_training_bitwise(tmp_path: Path) -> None:
    model, ema, optimizers = trained()
    folder = save_checkpoint(tmp_path, 3, model, ema, optimizers, {"config": {"a": 1}})
    assert folder == tmp_path / "checkpoints" / "step-0000003"
    names = [EMA, MODEL, OPTIMIZER, RANDOM]
    assert set(files(folder)) == {*names, STATE}
    assert json.loads((folder / STATE).read_text()) == {"step": 3, "config": {"a": 1}, "files": names}
    drawn = torch.rand(3)

    other = Net()
    others = make_optimizers(other, OptimConfig(name="muon", lr=0.1))
    average = load_training_state(folder, other, others)
    assert torch.equal(torch.rand(3), drawn)  # the random generators are restored, too
    assert list(average) == [name for name, _ in other.named_parameters()]
    assert all(torch.equal(average[name], ema[name]) for name in ema)
    for seed in (1, 2):
        for pair in ((model, optimizers), (other, others)):
            torch.manual_seed(seed)
            train(*pair)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_model_on_meta_takes_the_weights(run: Path) -> None:
    with torch.device("meta"):
        model = Net()
    load_weights(find_checkpoint(run) / MODEL, model)
    saved = load_file(find_checkpoint(run) / MODEL)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())


def test_copies_of_checkpoints_are_not_counted(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, *trained(), {})
    for name in ("step-0000009-best", "step-9", "step-x"):
        shutil.copytree(folder, folder.with_name(name))
    assert checkpoints(tmp_path) == [folder]
    assert find_checkpoint(tmp_path) == folder
    assert find_checkpoint(folder.with_name("step-x")).name == "step-x"  # but it can be named


def lose(folder: Path) -> None:
    (folder / MODEL).unlink()


def cut(folder: Path) -> None:
    (folder / EMA).write_bytes((folder / EMA).read_bytes()[:-1])


def spoil_state(folder: Path) -> None:
    (folder / STATE).write_text("{")


def lose_state(folder: Path) -> None:
    (folder / STATE).unlink()


@pytest.mark.parametrize("damage", [lose, cut, spoil_state, lose_state])
def test_a_damaged_checkpoint_is_skipped_and_replaced(
    run: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    state, whole = trained(), find_checkpoint(run)
    folder = save_checkpoint(run, 12, *state, {})
    damage(folder)
    assert find_checkpoint(run) == whole
    said = capsys.readouterr().err
    assert said.startswith("semroute: ")
    assert said.endswith(f"; resuming from {whole}\n")
    assert str(folder) in said
    saver = Saver(run, keep=1)
    for step in (7, 12):  # the damaged one, of a later step, does not count as kept
        saver.save(step, *state, {})
        saver.wait()
        assert read_state(find_checkpoint(run))["step"] == step
    assert capsys.readouterr().err.count("resuming from") == 1
    assert os.listdir(run / "checkpoints") == ["step-0000012"]


def test_a_run_with_only_damaged_checkpoints_is_refused(run: Path) -> None:
    lose(run / "checkpoints" / "step-0000003")
    with pytest.raises(ValueError, match=r"no complete checkpoint at .*: there is no .*model\.safetensors"):
        find_checkpoint(run)


def test_a_run_gives_its_latest_checkpoint_and_a_checkpoint_itself(run: Path) -> None:
    save_checkpoint(run, 12, *trained(), {})
    assert find_checkpoint(run).name == "step-0000012"
    assert find_checkpoint(run / "checkpoints" / "step-0000003").name == "step-0000003"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none", "it does not exist"),
        ("empty", r"holds no checkpoints/step-\*"),
        ("file", r"holds no checkpoints/step-\*"),
        ("file/x", "it does not exist"),
    ],
)
def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=f"no checkpoint at .*{message}.*give a run's folder"):
        find_checkpoint(tmp_path / place)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(11))
        self.out = nn.Linear(4, 2)
        self.extra = nn.Linear(1, 1, bias=False)


@pytest.mark.parametrize("file", [MODEL, EMA])
def test_weights_of_another_model_are_refused_with_both_sides(run: Path, file: str) -> None:
    folder = find_checkpoint(run)
    other = Other()
    if file == EMA:  # the weights fit, but the average is of another model
        save_file(dict(other.state_dict()), folder / MODEL)
        save_file({}, folder / OPTIMIZER)
    with pytest.raises(ValueError, match="belongs to another model") as error:
        load_training_state(folder, other, make_optimizers(other, OptimConfig()))
    for part in (file, "blocks.11.bias: not in the model", "extra.weight: not in the file", "(4 in all)"):
        assert part in str(error.value)
    assert "out.weight: (2, 3) in the file, (2, 4) in the model" in str(error.value)


def test_optimiser_state_of_another_model_is_refused(run: Path) -> None:
    folder = find_checkpoint(run)
    for wrong in ({"nobody/exp_avg": torch.ones(3)}, {"out.weight/exp_avg": torch.ones(5)}, {"exp_avg": torch.ones(3)}):
        save_file(wrong, folder / OPTIMIZER)
        model = Net()
        with pytest.raises(ValueError, match=r"optimizer\.safetensors belongs to another model"):
            load_training_state(folder, model, make_optimizers(model, OptimConfig()))


@pytest.mark.parametrize("file", [MODEL, EMA, OPTIMIZER])
@pytest.mark.parametrize("damage", ["missing", "cut", "text", "folder"])
def test_damaged_tensors_are_refused(run: Path, file: str, damage: str) -> None:
    folder = find_checkpoint(run)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "folder":
        (folder / file).mkdir()
    elif damage != "missing":
        (folder / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"hello")
    model = Net()
    message = f"there is no .*{file}" if damage == "missing" else f"{file} is damaged or not a safetensors file"
    with pytest.raises(ValueError, match=message):
        load_training_state(folder, model, make_optimizers(model, OptimConfig(name="muon")))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[]", b"{}", b'{"step": "3"}'])
def test_a_damaged_state_is_refused(run: Path, content: bytes | None) -> None:
    folder = find_checkpoint(run)
    (folder / STATE).unlink()
    if content is not None:
        (folder / STATE).write_bytes(content)
    model: Any = Net()
    for act in (lambda: read_state(folder), lambda: load_training_state(folder, model, [])):
        with pytest.raises(ValueError, match=r"step-0000003 (is not a checkpoint|was not written by semroute)"):
            act()
