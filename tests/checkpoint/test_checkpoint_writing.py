"""Writing checkpoints: complete or absent, and old ones deleted."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import semantic_routing.checkpoint.safetensors_storage as storage
from semantic_routing.checkpoint.load import (
    MODEL,
    STATE,
    checkpoints,
    find_checkpoint,
    read_state,
)
from semantic_routing.checkpoint.save import Saver, prune
from semantic_routing.common.files import check_writable, write_text, written_whole
from tests.helpers.checkpoints import files, save_checkpoint, train, trained


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
    when="a file or folder would replace a folder that holds other files",
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
