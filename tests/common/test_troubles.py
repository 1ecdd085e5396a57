"""Failures beside the main work: each is reported once and ignored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from semantic_routing.common.troubles import Troubles, forgiving_stderr, say


def fail(troubles: Troubles, what: str, error: Exception, *more: type[Exception]) -> None:
    with troubles.survived(what, *more):
        raise error


def test_each_failure_is_reported_once_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    troubles = Troubles()
    for what in ("metrics.jsonl", "metrics.jsonl", "samples"):
        fail(troubles, what, OSError(28, "No space left on device"))
    fail(troubles, "wandb", RuntimeError("is gone"), RuntimeError)
    assert capsys.readouterr().err.splitlines() == [
        "semroute: metrics.jsonl: No space left on device; continuing without it (reported once)",
        "semroute: samples: No space left on device; continuing without it (reported once)",
        "semroute: wandb: is gone; continuing without it (reported once)",
    ]


def test_other_errors_are_errors() -> None:
    for error in (RuntimeError("a fault"), KeyboardInterrupt()):
        with pytest.raises(type(error)), Troubles().survived("metrics"):
            raise error


def test_a_stream_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space left"):
            sys.stderr.write("a line\n")
        with forgiving_stderr():
            assert sys.stderr.write("a line\n") == 7
            sys.stderr.flush()
            assert not sys.stderr.isatty()
        say("a line")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_a_stream_that_can_be_written_is(capsys: pytest.CaptureFixture[str]) -> None:
    with forgiving_stderr():
        sys.stderr.write("a line\n")
    say("two\nlines")
    assert capsys.readouterr().err == "a line\nsemroute: two lines\n"
