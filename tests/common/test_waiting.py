"""Threads sleep beside busy processes, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from semantic_routing.common import waiting
from semantic_routing.common.waiting import busy_processors, wait_without_spinning_if_busy


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process on two processors that has not loaded torch, without settings of the user."""
    for name in (*waiting.SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(waiting.os, "sched_getaffinity", lambda process: {0, 1})
    return monkeypatch


@pytest.mark.behaviour(
    "Surroundings",
    when="other processes keep processors busy when a command begins",
    then="its threads sleep when they wait for each other, and a line says so; OMP_WAIT_POLICY and GOMP_SPINCOUNT stay",
)
@pytest.mark.parametrize(("busy", "sleeps"), [(0.0, False), (0.4, False), (0.6, True), (2.0, True)])
def test_threads_sleep_beside_busy_processes(
    fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], busy: float, sleeps: bool
) -> None:
    fresh.setattr(waiting, "busy_processors", lambda ours: busy)
    wait_without_spinning_if_busy()
    assert (os.environ.get("GOMP_SPINCOUNT") == "0") == sleeps
    said = capsys.readouterr().err
    assert ("other processes keep" in said) == sleeps
    assert said.count("\n") == sleeps


@pytest.mark.parametrize("case", ["policy", "count", "one thread", "one processor", "torch"])
def test_choices_of_the_user_stay(fresh: pytest.MonkeyPatch, case: str) -> None:
    fresh.setattr(waiting, "busy_processors", lambda ours: 2.0)
    if case == "one processor":
        fresh.setattr(waiting.os, "sched_getaffinity", lambda process: {1})
    elif case == "torch":
        fresh.setattr(waiting, "sys", SimpleNamespace(modules={"torch": None}))
    else:
        fresh.setenv(*{"policy": ("OMP_WAIT_POLICY", "active"), "count": ("GOMP_SPINCOUNT", "7")}.get(
            case, ("OMP_NUM_THREADS", "1")
        ))  # fmt: skip
    before = dict(os.environ)
    wait_without_spinning_if_busy()
    assert dict(os.environ) == before


def test_busy_processors_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processor 0 idles for 25 of 50 ticks, 1 for none, 2 is not ours; then without /proc."""
    rows = "cpu  9 9 9 9 9\ncpu0 5 0 5 {idle} 0 0\ncpu1 5 0 5 70 7 0\ncpu2 0 0 0 {idle} 0 0\nintr 1\n"
    texts = (rows.format(idle=idle) for idle in (100, 125))
    (tmp_path / "stat").write_text(next(texts))
    monkeypatch.setattr(waiting, "STAT", tmp_path / "stat")
    monkeypatch.setattr(waiting.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: (tmp_path / "stat").write_text(next(texts)))
    assert busy_processors({0, 1}, 0.5) == pytest.approx(1.5)
    monkeypatch.setattr(waiting, "STAT", tmp_path / "none")
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
    assert busy_processors({0, 1}, 0.5) == 0


@pytest.mark.skipif(not waiting.STAT.exists(), reason="needs Linux's /proc")
def test_a_busy_process_is_seen() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as other:
        try:
            other.stdout.readline()
            assert busy_processors(os.sched_getaffinity(0)) > 0.5
        finally:
            other.kill()
