"""Metrics in the run's file and in the services: cut back to the resumed step, named, and without secrets."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semantic_routing.training.tracking import Tracker, append, without_secrets

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


# --- the file and TensorBoard ---


def test_rows_are_lines_of_json(tmp_path: Path) -> None:
    with Tracker(tmp_path, 0) as tracker:
        tracker.write({"step": 1, "loss": 0.5})
        assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]  # at once: a crash loses nothing
        tracker.write({"step": 2, "loss": 0.25, "skipped": 1})
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "skipped": 1}]


def test_what_a_stopped_run_wrote_after_its_checkpoint_is_cut_off(tmp_path: Path) -> None:
    with Tracker(tmp_path, 0) as tracker:
        for step in (1, 2, 3):
            tracker.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Tracker(tmp_path, 2) as tracker:
        assert [row["step"] for row in rows(tmp_path)] == [1, 2]
        tracker.write({"step": 3, "loss": 30.0})
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 2.0, 30.0]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_numbers_that_are_not_finite_leave_the_file_json(tmp_path: Path) -> None:
    with Tracker(tmp_path, 0) as tracker:
        tracker.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert rows(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]
    assert events(tmp_path).Tags()["scalars"] == []


def test_tensorboard_shows_numbers_and_pictures(tmp_path: Path) -> None:
    with Tracker(tmp_path, 0) as tracker:
        tracker.write({"step": 7, "loss": 0.5})
        tracker.picture(7, "samples", PICTURE)
    found = events(tmp_path)
    assert found.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(7, 0.5)]
    (shown,) = found.Images("samples")
    assert (shown.step, shown.height, shown.width) == (7, 4, 5)


@pytest.mark.behaviour(
    "Training",
    when="metrics, TensorBoard's files, samples or the list of damaged records cannot be written, or a tracker fails",
    then="this is reported once and the run continues; lines of metrics are written later if possible",
)
def test_rows_that_cannot_be_written_are_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, 0) as tracker:
        tracker.write({"step": 1, "loss": 0.5})
        path.rename(tmp_path / "kept")
        path.symlink_to("/dev/full")
        tracker.write({"step": 2, "loss": 0.25})
        tracker.write({"step": 3, "loss": 0.125})
        path.unlink()
        (tmp_path / "kept").rename(path)
        tracker.write({"step": 4, "loss": 0.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("semroute: ")]
    assert told == [f"semroute: {path}: No space left on device; continuing without it (reported once)"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append(path, "first\n")
    opened = Path.open

    class Full:
        """A file on a disk that takes three more bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:3]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args, **how: Full(opened(self, *args, **how)))
        with pytest.raises(OSError, match=r"No space left on device.*lines"):
            append(path, "second\n")
    assert path.read_text() == "first\n"


def test_lines_that_are_no_metrics_are_cut_out(tmp_path: Path) -> None:
    broken = '{"step": 2, "lo{"step": 3}\n[]\n{"loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{broken}{{"step": 2}}\n')
    with Tracker(tmp_path, 9):
        assert [row["step"] for row in rows(tmp_path)] == [1, 2]


# --- services ---


class Service(ModuleType):
    """Stands for wandb or trackio: writes down what is asked of it."""

    class Error(Exception):
        """As wandb names its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []
        self.id = "run-1"

    def init(self, **options: Any) -> Service:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("log", (step, values)))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def Image(self, value: np.ndarray) -> list[Any]:
        return ["image", value.tolist()]

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Service]:
    def put(name: str) -> Service:
        service = Service(name)
        monkeypatch.setitem(sys.modules, name, service)
        return service

    return put


def two_rows_and_a_picture(run: Path, service: str) -> None:
    with Tracker(run, 0, [service], {"data": "s3://me:key@bucket/x", "optim": {"lr": 0.1}}) as tracker:
        tracker.write({"step": 5, "loss": 0.5, "grad_norm": math.nan})
        tracker.picture(5, "samples", PICTURE)


def test_wandb_is_told_everything_with_the_step_as_a_column(tmp_path: Path, install: Callable[[str], Service]) -> None:
    run, wandb = tmp_path / "depth", install("wandb")
    two_rows_and_a_picture(run, "wandb")
    config = {"data": "s3://bucket/x", "optim": {"lr": 0.1}}
    options = {"project": "semantic-routing", "name": "depth", "resume": "allow", "dir": str(run), "config": config}
    assert wandb.calls == [
        ("init", {**options, "id": None}),
        ("define_metric", ("*", "step")),
        ("log", (None, {"step": 5, "loss": 0.5})),
        ("log", (None, {"step": 5, "samples": ["image", PICTURE.tolist()]})),
        ("finish", None),
    ]
    assert rows(run) == [{"step": 5, "loss": 0.5, "grad_norm": None}]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, install: Callable[[str], Service]) -> None:
    install("wandb").id = "abc123"
    with Tracker(tmp_path, 0, ["wandb"]):
        pass
    again = install("wandb")
    with Tracker(tmp_path, 9, ["wandb"]):
        pass
    assert again.calls[0][1]["id"] == "abc123"


def test_wandb_that_refuses_says_how_to_log_in(
    tmp_path: Path, install: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = install("wandb")

    def refuse(**options: Any) -> None:
        raise wandb.Error("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"wandb: no API key configured; log in with `wandb login` or set WANDB_MODE"):
        Tracker(tmp_path, 0, ["wandb"])


@pytest.mark.parametrize("service", ["wandb", "trackio"])
@pytest.mark.parametrize("error", [Service.Error("gone"), ConnectionError("gone"), RuntimeError("gone")])
def test_a_service_that_fails_ends_nothing(
    tmp_path: Path, install: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], service: str, error: Exception,
) -> None:  # fmt: skip
    board = install(service)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with Tracker(tmp_path, 0, [service]) as tracker:
        for name in ("log", "finish"):
            monkeypatch.setattr(board, name, fail)
        for step in (1, 2):
            tracker.write({"step": step, "loss": 0.5})
            tracker.picture(step, "samples", PICTURE)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count("gone") == 1


def test_trackio_is_told_everything(tmp_path: Path, install: Callable[[str], Service]) -> None:
    run, trackio = tmp_path / "depth", install("trackio")
    two_rows_and_a_picture(run, "trackio")
    config = {"data": "s3://bucket/x", "optim": {"lr": 0.1}}
    assert trackio.calls == [
        ("init", {"project": "semantic-routing", "name": "depth", "resume": "never", "config": config}),
        ("log", (5, {"loss": 0.5})),
        ("log", (5, {"samples": ["image", PICTURE.tolist()]})),
        ("finish", None),
    ]
    with Tracker(run, 5, ["trackio"]):
        pass
    assert trackio.calls[4][1]["resume"] == "allow"


@pytest.mark.parametrize("service", ["wandb", "trackio", "tensorboard"])
def test_a_missing_library_is_named_before_anything_is_written(
    tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, service, None)
    told = rf'--track {service} needs {service}, .*pip install "semantic-routing\[track\]"'
    with pytest.raises(ValueError, match=told):
        Tracker(tmp_path, 0, [service])
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_the_file_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with Tracker(tmp_path, 0) as tracker:
        tracker.write({"step": 1, "loss": 0.5})
        tracker.picture(1, "samples", PICTURE)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://me:secret@host/data/{000..999}.tar", "https://host/data/{000..999}.tar"),
        ("https://host/a.tar?X-Amz-Signature=abc&x=1", "https://host/a.tar"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("photos/me@home?", "photos/me@home?"),
        ({"sources": [{"path": "gs://token@bucket/x"}]}, {"sources": [{"path": "gs://bucket/x"}]}),
        (("a", None, True), ["a", None, True]),
    ],
)
def test_addresses_lose_what_may_be_a_secret(value: object, shown: object) -> None:
    assert without_secrets(value) == shown
