"""Checkpoints: complete or absent, restored exactly, and refused by another model."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

import semantic_routing.checkpoint.safetensors_storage as storage
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
from semantic_routing.checkpoint.save import Saver, prune
from semantic_routing.common.files import check_writable, write_text, written_whole
from semantic_routing.training.optim import OptimConfig, make_optimizers
from tests.helpers.checkpoints import save_checkpoint


class Net(nn.Module):
    """More than ten blocks of one shape, so that an order by name would mix them up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.out = nn.Linear(3, 2)


def trained(steps: int = 3) -> tuple[Net, dict[str, Tensor], list[Optimizer]]:
    model = Net()
    optimizers = make_optimizers(model, OptimConfig(name="muon", lr=0.1))
    for _ in range(steps):
        train(model, optimizers)
    return model, {name: torch.randn_like(p) for name, p in model.named_parameters()}, optimizers


def train(model: Net, optimizers: list[Optimizer]) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint of step 3."""
    save_checkpoint(tmp_path / "run", 3, *trained(), {"config": {"a": 1}})
    return tmp_path / "run"


# --- round trips ---


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


# --- complete or absent ---


def write_folder(path: Path) -> None:
    with written_whole(path) as scratch:
        scratch.mkdir()
        (scratch / "new").write_text("new")


def test_a_file_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "first")
    write_text(tmp_path / "a" / "b.txt", "second")
    (tmp_path / "folder").mkdir()
    write_folder(tmp_path / "folder")
    assert files(tmp_path) == {"a/b.txt": b"second", "folder/new": b"new"}


@pytest.mark.behaviour(
    "Surroundings",
    when="a file or folder would be written over a folder that holds other files",
    then="one line names the folder, and nothing in it changes",
)
@pytest.mark.parametrize("write", [write_folder, lambda path: write_text(path, "new")], ids=["folder", "file"])
def test_a_folder_with_files_is_never_replaced(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write_text(tmp_path / "photos" / "cat.txt", "a cat")
    with pytest.raises(ValueError, match=r"cannot write .*photos: (Directory not empty|Is a directory)"):
        write(tmp_path / "photos")
    assert files(tmp_path) == {"photos/cat.txt": b"a cat"}


class Stopped(Exception):
    """An error that the program itself never raises."""


@pytest.mark.parametrize(
    ("failure", "seen"), [(Stopped(), CheckpointException), (OSError(30, "Read-only file system"), ValueError)]
)
def test_a_failed_write_changes_no_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, seen: type[Exception]
) -> None:
    before = files(run)
    calls: list[Path] = []

    def fail_in_the_middle(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of a f")
            raise failure
        save_file(tensors, path, header)

    monkeypatch.setattr(storage, "save_file", fail_in_the_middle)
    for step in (3, 4):  # over an existing checkpoint and beside it
        calls.clear()
        with pytest.raises(seen):
            save_checkpoint(run, step, *trained(), {})
        assert len(calls) == 2
        assert files(run) == before
        assert os.listdir(run / "checkpoints") == ["step-0000003"]


def test_a_checkpoint_holds_the_state_of_its_step_and_wait_reports_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = Event(), Event()

    def slow(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None) -> None:
        began.set()
        assert go.wait(30)
        if "step-0000004" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, header)

    monkeypatch.setattr(storage, "save_file", slow)
    (model, ema, optimizers), saver = trained(), Saver(tmp_path)
    folder = saver.save(3, model, ema, optimizers, {})
    assert began.wait(30)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizers)
    assert not folder.exists()
    assert not saver.failed
    go.set()
    saver.wait()
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(folder / MODEL).items())

    saver.save(4, model, ema, optimizers, {})
    saver.close()
    assert saver.failed
    with pytest.raises(ValueError, match=r"cannot write .*/step-0000004: \w+\.safetensors: No space left on device"):
        saver.save(5, model, ema, optimizers, {})
    assert not saver.failed
    assert os.listdir(tmp_path / "checkpoints") == ["step-0000003"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit files to ``size`` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 900])
def test_a_full_disk_is_one_clear_error(run: Path, size: int) -> None:
    before = files(run)
    state = trained()
    with largest_file(size), pytest.raises(ValueError, match=r"cannot write .*step-0000009: .*[Ff]ile too large"):
        save_checkpoint(run, 9, *state, {})
    assert files(run) == before
    assert os.listdir(run / "checkpoints") == ["step-0000003"]


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_folders_that_cannot_be_written_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    for act in (
        lambda: write_text(tmp_path / place / "x.txt", "x"),
        lambda: save_checkpoint(tmp_path / place, 1, *trained(1), {}),
        lambda: check_writable(tmp_path / place),
    ):
        with pytest.raises(ValueError, match="cannot write"):
            act()
    assert files(tmp_path) == {"file": b"in the way"}


def test_checking_a_writable_folder_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path / "new" / "folder", Path("new"), Path()):
        check_writable(place)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_checkpoint_of_a_killed_process_is_ignored_and_deleted(run: Path) -> None:
    remnant = run / "checkpoints" / ".step-0000008.partial-12345"
    remnant.mkdir()
    (remnant / MODEL).write_bytes(b"half of a f")
    assert find_checkpoint(run).name == "step-0000003"
    prune(run, 1)
    assert os.listdir(run / "checkpoints") == ["step-0000003"]


def test_prune_keeps_the_latest(tmp_path: Path) -> None:
    state = trained()
    for step in (999_999, 1, 20, 1_000_000, 3):
        save_checkpoint(tmp_path, step, *state, {})
    prune(tmp_path, 2)
    assert [read_state(folder)["step"] for folder in checkpoints(tmp_path)] == [999_999, 1_000_000]
    prune(tmp_path, 2)
    assert len(checkpoints(tmp_path)) == 2


@pytest.mark.behaviour(
    "Training",
    when="copies, notes or folders of the user are among or in a run's checkpoints",
    then="they are never deleted, nor is a checkpoint that holds other files",
)
def test_prune_deletes_no_file_of_the_user(tmp_path: Path) -> None:
    state = trained()
    folders = [save_checkpoint(tmp_path, step, *state, {}) for step in (1, 2, 3, 4)]
    place = tmp_path / "checkpoints"
    for name in ("step-0000001-best", "step-favourite", "step-1", "best"):
        shutil.copytree(folders[0], place / name)
    for name in ("step-notes.txt", "notes.txt", "step-0000002 (copy).zip", ".step-mine.partial-x", "step-0000000"):
        (place / name).write_text("mine")
    (folders[1] / "why.txt").write_text("I keep this one")
    (place / ".step-0000009.partial-77").mkdir()  # of a killed process, with a user's file in it
    (place / ".step-0000009.partial-77" / "note").write_text("mine")
    before = {
        name: data for name, data in files(place).items() if not name.startswith(("step-0000001/", "step-0000003/"))
    }
    prune(tmp_path, 1)
    assert files(place) == before
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-0000000", "step-0000002", "step-0000004"]


def test_copies_of_checkpoints_are_not_counted(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, *trained(), {})
    for name in ("step-0000009-best", "step-9", "step-x"):
        shutil.copytree(folder, folder.with_name(name))
    assert checkpoints(tmp_path) == [folder]
    assert find_checkpoint(tmp_path) == folder
    assert find_checkpoint(folder.with_name("step-x")).name == "step-x"  # but it can be named


def test_replacing_a_checkpoint_keeps_a_users_files(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, *trained(), {})
    (folder / "why.txt").write_text("mine")
    (folder / STATE).unlink()
    assert save_checkpoint(tmp_path, 3, *trained(), {}) == folder
    assert find_checkpoint(tmp_path) == folder
    (kept,) = tmp_path.rglob("why.txt")
    assert kept.read_text() == "mine"
    assert kept.parent.name.startswith("step-0000003-replaced-")


def test_every_nth_step_is_kept_for_good(tmp_path: Path) -> None:
    state, saver = trained(), Saver(tmp_path, keep=2, keep_every=4)
    for step in range(1, 10):
        saver.save(step, *state, {})
    saver.wait()
    assert [read_state(folder)["step"] for folder in checkpoints(tmp_path)] == [4, 8, 9]


# --- damage ---


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
    assert said.endswith(f"; going on from {whole}\n")
    assert str(folder) in said
    saver = Saver(run, keep=1)
    for step in (7, 12):  # the damaged one, of a later step, does not count as kept
        saver.save(step, *state, {})
        saver.wait()
        assert read_state(find_checkpoint(run))["step"] == step
    assert capsys.readouterr().err.count("going on from") == 1
    assert os.listdir(run / "checkpoints") == ["step-0000012"]


def test_a_run_with_only_damaged_checkpoints_is_refused(run: Path) -> None:
    lose(run / "checkpoints" / "step-0000003")
    with pytest.raises(ValueError, match=r"no complete checkpoint at .*: there is no .*model\.safetensors"):
        find_checkpoint(run)


# --- of which run and model ---


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
