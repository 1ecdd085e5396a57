"""Every arm in every command that takes an arm or reads a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from semantic_routing.analysis.report import write_report
from semantic_routing.analysis.routers import open_router
from semantic_routing.cli.main import main
from semantic_routing.model.arms import ARMS, PAPER_ARMS
from semantic_routing.model.change_arm import changeable
from semantic_routing.study.plan import StudyArguments, jobs
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start

pytestmark = pytest.mark.usefixtures("undrawn")


ALIKE = ("time-state", "depth-kv", "depth-heads", "depth-heads-kv")
"""Arms whose every property another one shares: joint-state and depth-low-rank."""


@pytest.fixture(
    scope="module", params=[pytest.param(arm, marks=pytest.mark.stress) if arm in ALIKE else arm for arm in ARMS]
)
def arm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(arm: str, tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps with previews and metrics."""
    out = tmp_path_factory.mktemp("every") / arm
    start(tiny_config(arm, steps=2, preview_every=2), out)
    return out


def refused(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    """Run a command that must exit with code 2; return its one line of error."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def call(*command: object) -> None:
    main([str(word) for word in command])


def test_sample(run: Path, tmp_path: Path) -> None:
    call("sample", run, "--prompt", "a red circle", "--steps", 2, "--out", tmp_path / "images", "--device", "cpu")
    assert (tmp_path / "images" / "00000_00.png").is_file()


def test_sample_with_routing_of_a_file(run: Path, arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row reads the second layer; a folder holds images of one routing only."""
    rows = list(open_router(run).cfg.rows)
    file, out = tmp_path / "routing.json", tmp_path / "images"
    file.write_text(json.dumps({"rows": rows, "weights": [[0, 1]] * len(rows)}))
    command = ("sample", run, "--prompt", "a red circle", "--steps", 2, "--out", out, "--device", "cpu")
    if ARMS[arm].reads_keys:
        assert "has no routing weights to override" in refused(capsys, *command, "--routing", file)
        return
    call(*command, "--routing", file)
    capsys.readouterr()  # the progress bar
    assert json.loads((out / "manifest.json").read_text())["routing"]["rows"] == rows
    assert "holds other images (routing" in refused(capsys, *command)
    file.write_text(json.dumps({"rows": ["block 9"], "weights": [[0, 1]]}))
    assert f"{file}: arm '{arm}' has no row 'block 9'" in refused(capsys, *command, "--routing", file)


def test_evaluate_and_report(run: Path, arm: str, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    call("evaluate", "shapes", "--model", run, "--n", 11, "--steps", 2, "--out", out, "--device", "cpu")
    page = write_report(run, out, tmp_path, {"train": 1.0, "evaluate": 1.0}).read_text()
    assert ARMS[arm].title in page
    assert ARMS[arm].reads in page


def test_analyze(run: Path, arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["analyze", run, "--out", tmp_path]
    if ARMS[arm].has_weights:
        call(*command, "--html")
        assert list(tmp_path.glob("heatmap*.csv"))
    else:
        reason = refused(capsys, *command)
        assert ("no router" in reason) is ARMS[arm].reads_keys
        assert ("differ from token to token" in reason) is ARMS[arm].by_token
    trajectory = ("--trajectory", "--n", 2, "--steps", 2, "--guidance", 1, 3, "--device", "cpu")
    call(*command[:-1], tmp_path / "trajectory", *trajectory)
    assert (tmp_path / "trajectory" / "lead.json").is_file()


def test_overhead(arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("overhead", "--scale", "toy", "--arms", arm, "--json", tmp_path / "overhead.json")
    assert list(json.loads((tmp_path / "overhead.json").read_text())["arms"]) == [arm]
    assert f"| {ARMS[arm].title} |" in capsys.readouterr().out


def test_export(run: Path, tmp_path: Path) -> None:
    call("export", run, "--out", tmp_path / "pipeline")
    call("evaluate", "shapes", "--model", tmp_path / "pipeline", "--n", 11, "--steps", 2, "--out", tmp_path / "e")
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["n"]["overall"] == 11


def test_convert(arm: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arms of the paper are converted; others, which the reference lacks, are refused by name."""
    out = tmp_path / "model.safetensors"
    command = ("convert", "ours", run, "--out", out)
    if arm in PAPER_ARMS:
        call(*command)
        assert out.is_file()
    else:
        assert f"no arm '{arm}'" in refused(capsys, *command)
        assert not out.exists()


def test_convert_arm(arm: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of an arm with constant logits becomes one with all parts apart, which samples; others are refused."""
    command = ("convert", "arm", run, "--arm", "depth-heads-kv", "--out", tmp_path / "finer")
    if changeable(ARMS[arm]):
        call(*command)
        call("sample", tmp_path / "finer", "--prompt", "a star", "--steps", 2, "--out", tmp_path / "images")
        assert (tmp_path / "images" / "00000_00.png").is_file()
    else:
        assert f"arm '{arm}' has no constant logits" in refused(capsys, *command)
        assert not (tmp_path / "finer" / "checkpoints").exists()


def test_study(arm: str, tmp_path: Path) -> None:
    plan = jobs(StudyArguments(scale="toy", arms=(arm,), out=tmp_path, seeds=1, clocks=("shifted",)))
    assert [job.arm for job in plan] == [arm]
    assert (plan[0].clocks == ("shifted",)) is ARMS[arm].takes_clock


def test_quickstart_knows_the_arm_before_it_begins(
    arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "unknown arm" not in refused(capsys, "quickstart", "--arm", arm, "--out", tmp_path / "file" / "run")
