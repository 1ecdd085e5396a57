"""The quickstart with a tiny recipe, through an interruption to the report."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import semantic_routing.cli.quickstart as module
from semantic_routing.checkpoint.load import checkpoints
from semantic_routing.cli.quickstart import QuickstartArguments, Timings, affordable_steps, run_quickstart
from semantic_routing.common.errors import Interrupted
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start


@pytest.fixture(autouse=True)
def small(tiny_config: Callable[..., TrainConfig], tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "toy", tiny_config)
    monkeypatch.setattr(module, "training_corpus", lambda source: [])
    monkeypatch.setattr(module, "tiny_lm", lambda captions: tiny_encoder)


def test_a_stopped_quickstart_is_resumed_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quickstart"
    args = QuickstartArguments(out=out, arm="S2", prompts=11, steps=6)

    def stop(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module, "start", partial(start, on_step=stop))
        with pytest.raises(Interrupted):
            run_quickstart(args)
    before = json.loads((out / "timings.json").read_text())
    assert list(before) == ["train"]
    assert run_quickstart(args) == out / "report.html"
    assert "</html>" in (out / "report.html").read_text()
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["steps"] == 6
    assert {"overall", "single_object", "counting", "position"} <= numbers["accuracy"].keys()
    after = json.loads((out / "timings.json").read_text())
    assert after["train"] > before["train"]
    assert numbers["train_seconds"] == pytest.approx(after["train"], rel=0.01)
    assert numbers["total_seconds"] == pytest.approx(sum(after.values()), rel=0.01)

    for other in ({"arm": "uniform"}, {"seed": 1}, {"steps": 7}):
        changed = QuickstartArguments(**({"out": out, "arm": "depth", "prompts": 11, "steps": 6} | other))
        with pytest.raises(ValueError, match="holds another run \\(arm depth, 6 steps, seed 42\\); choose another"):
            run_quickstart(changed)
    assert run_quickstart(QuickstartArguments(out=out, prompts=11)) == out / "report.html"  # any number of steps


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 2000), (2.0, 200), (10.0, 100)])
def test_steps_are_fitted_to_the_machine(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    seconds: float, steps: int,
) -> None:  # fmt: skip
    """Steps of 2 s: 270 fit into 540 s, rounded down to hundreds; at least 100; warm-up steps do not count."""
    warm = module.WARM_UP
    ends = [100.0 * (warm + 1) + seconds * i for i in range(module.TRIAL_STEPS - warm)]
    clock = iter([100.0 * (i + 1) for i in range(warm)] + ends)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert affordable_steps(tiny_config(steps=2000)) == steps
    assert (f"training {steps} steps instead of 2000" in capsys.readouterr().err) == (steps < 2000)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "affordable_steps", None)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        run_quickstart(QuickstartArguments(out=tmp_path / "file" / "out"))
    assert checkpoints(tmp_path) == []


def test_times_are_summed_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (tmp_path / "t.json").write_text('{"train": 100.0}')
    timings = Timings(tmp_path / "t.json")
    with pytest.raises(RuntimeError), timings.measured("train"):
        raise RuntimeError
    with timings.measured("evaluate"):
        pass
    assert Timings(tmp_path / "t.json").seconds == timings.seconds == {"train": 103.0, "evaluate": 0.5}
