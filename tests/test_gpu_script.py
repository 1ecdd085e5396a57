"""benchmarks/gpu.sh: its command lines, and what it skips, leaves and repeats. A stress test runs it on a CPU."""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from semantic_routing.cli.arguments import parse
from semantic_routing.study.plan import StudyArguments
from tests.test_docs_site import ROOT

Sitting = Callable[..., tuple[int, dict[str, str]]]
PYTHON = """#!/bin/sh
# In place of Python: log what it is to run, and fail if there is a file that says so.
case "$*" in *--collect-only*|-c*) exit 0 ;; esac
echo "$*" >> "$FAKE/log"
for word in "$@"; do
    case "$word" in */*.json) name=$(basename "$word" .json) ;; esac
done
[ -e "$FAKE/fail-$name" ] && exit 1
exit 0
"""


def script(*args: str, **environment: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *args]
    given = os.environ | {"PYTHON": sys.executable} | {name: str(value) for name, value in environment.items()}
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


@pytest.fixture
def sitting(tmp_path: Path) -> Sitting:
    """A function that runs the script with a Python that does nothing, and returns its exit code and summary."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def sit(*args: str, **environment: object) -> tuple[int, dict[str, str]]:
        places = {"PYTHON": python, "FAKE": tmp_path, "OUT": tmp_path / "out", "WORK": tmp_path / "work"}
        done = script(*args, **(places | environment))
        lines = (tmp_path / "out/summary.txt").read_text().splitlines()
        return done.returncode, dict(line.split(": ", 1) for line in lines if line)

    return sit


def test_a_second_sitting_does_only_what_the_first_did_not(sitting: Sitting, tmp_path: Path) -> None:
    (tmp_path / "fail-sampling").touch()
    code, first = sitting()
    assert code == 1
    assert first.pop("sampling").startswith("failed with code 1")
    assert len(first) == 14
    assert all(end.startswith("done in") for end in first.values())
    (tmp_path / "fail-sampling").unlink()
    (tmp_path / "log").unlink()
    code, second = sitting()
    assert code == 0
    assert second.pop("sampling").startswith("done in")
    assert set(second.values()) == {"done before"}
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_parts_that_might_not_end_in_time_are_left(sitting: Sitting) -> None:
    code, found = sitting(TIME=115)
    assert code == 3
    assert {name for name, end in found.items() if end.startswith("left")} == {"sampling", "commands", "adopt", "tests"}
    assert found["commands"].startswith("left, it needs 420 s of the ")
    code, found = sitting("commands", TIME=500)
    assert (code, list(found)) == (0, ["commands"])


def test_a_named_part_runs_again(sitting: Sitting, tmp_path: Path) -> None:
    for _ in range(2):
        code, found = sitting("mix")
        assert (code, list(found)) == (0, ["mix"])
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    assert script("mixes").stderr.startswith("benchmarks/gpu.sh has no part mixes; it has mix train_step")


def test_a_study_continues_from_the_results_of_an_earlier_sitting(sitting: Sitting, tmp_path: Path) -> None:
    kept = tmp_path / "out/study-small/kept/depth-seed0.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    sitting("small1")
    assert (tmp_path / "work/study-small/kept/depth-seed0.json").read_text() == "{}"


class Parsed(Exception):
    """Raised in place of a benchmark's measurements, with its settings."""


@pytest.mark.parametrize("sizes", [(), ("--rehearse",)], ids=["whole", "rehearsed"])
def test_every_command_line_is_one_that_its_program_takes(
    sizes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The benchmarks' own parsers and that of the studies read them, up to where the work would begin."""
    known = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser) -> None:
        raise Parsed(known(self))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    printed = script("--print", *sizes, OUT=tmp_path, WORK=tmp_path)
    assert printed.returncode == 0, printed.stderr
    lines = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert len(lines) == 15
    for words in lines:
        rest = words[words.index(sys.executable) + 1 :]
        if rest[:3] == ["-m", "semantic_routing", "study"]:
            assert parse(StudyArguments, rest[3:], prog="semroute study").out.parent == tmp_path
        elif rest[0] != "-m":
            monkeypatch.setattr(sys, "argv", rest)
            with pytest.raises(Parsed) as found:
                runpy.run_path(str(ROOT / rest[0]), run_name="__main__")
            assert found.value.args[0].out.parent == tmp_path


@pytest.mark.stress
def test_a_rehearsal_runs_every_part_on_a_cpu(tmp_path: Path) -> None:
    done = script("--rehearse", OUT=tmp_path / "out", WORK=tmp_path / "work")
    assert done.returncode == 0, done.stdout
    ends = dict(line.split(": ", 1) for line in (tmp_path / "out/summary.txt").read_text().splitlines())
    assert len(ends) == 15
    assert all("done in" in end or "it needs" in end for end in ends.values()), ends
    for name in ("mix", "train_step", "sampling", "commands", "backbone"):
        assert (tmp_path / f"out/{name}-manifest.json").is_file()
    assert list((tmp_path / "out/study-small/kept").glob("depth-seed?.json"))
