"""The plan of a study, its numbers in closed form, its tables, and a tiny study from start to end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from semantic_routing.cli.evaluate import ShapesArguments
from semantic_routing.common.errors import TrainingFailed
from semantic_routing.evaluation.records import CORRECT, LOSS, RECORDS, Record, read_records
from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.study import plan, runner
from semantic_routing.study.keep import is_kept, kept_weights, write_kept
from semantic_routing.study.plan import StudyArguments, evaluation_folder, jobs, stages
from semantic_routing.study.results import Number, Row, over_seeds, read_pairs, read_rows, results_json
from semantic_routing.study.runner import run_study
from semantic_routing.study.tables import _number, sections, to_html, to_markdown, write_results
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import GATE_RATE
from tests.helpers.forked import MAIN, Forked


def test_every_arm_runs_with_every_seed_and_only_learned_ones_with_every_rate(tmp_path: Path) -> None:
    args = StudyArguments(
        scale="toy", out=tmp_path, arms=("B1", "S2", "S3"), seeds=2, router_rates=(1.0, 10.0), steps=70
    )
    found = jobs(args)
    names = ["penultimate", "depth", "depth-rate10", "joint", "joint-rate10"]
    assert [job.name for job in found] == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    by_name = {job.name: job for job in found}
    plain, fast = by_name["depth-seed1"].config, by_name["depth-rate10-seed1"].config
    assert (plain.seed, plain.steps, plain.optim.router_lr) == (1, 70, None)
    assert fast.optim.router_lr == pytest.approx(10 * plain.optim.lr)
    slow, gates = by_name["joint-seed1"].config, by_name["joint-rate10-seed1"].config
    assert slow.optim.router_lr == GATE_RATE
    assert gates.optim.router_lr == pytest.approx(10 * GATE_RATE)
    assert {(job.config.model.width, job.config.batch) for job in found} == {(192, 128)}
    assert by_name["joint-seed0"].clocks == ("shifted", "calibrated")
    assert by_name["depth-seed0"].clocks == ()


def test_the_stages_of_a_run_are_commands_of_the_program(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("joint",))
    (job,) = jobs(args)
    what = [(stage.what, stage.command[0]) for stage in stages(job, args)]
    assert what == [
        ("training", "train"),
        ("scoring", "evaluate"),
        ("measuring the loss", "evaluate"),
        ("calibrating", "analyze"),
        ("scoring, shifted clock", "evaluate"),
        ("scoring, calibrated clock", "evaluate"),
    ]
    assert {stage.what: stage.done.name for stage in stages(job, args)}["calibrating"] == "lead.json"  # written last
    (tmp_path / "runs" / job.name / "checkpoints" / "step-0000010").mkdir(parents=True)
    (tmp_path / "runs" / job.name / "config.json").write_text("{}")
    first = next(stages(job, args))
    assert first.command == ("train", "--resume", str(tmp_path / "runs" / job.name))


def test_each_scale_has_its_arms_seeds_and_sampling(tmp_path: Path) -> None:
    toy, small = (jobs(StudyArguments(scale=scale, out=tmp_path)) for scale in ("toy", "small"))
    assert [job.name for job in toy] == ["penultimate-seed0", "uniform-seed0", "depth-seed0"]
    assert [job.name for job in small] == [f"{arm}-seed{seed}" for seed in range(3) for arm in PAPER_ARMS]
    assert {(job.config.model.width, job.config.steps, job.config.batch) for job in small} == {(512, 3000, 256)}
    words, large = (jobs(StudyArguments(scale=scale, out=tmp_path)) for scale in ("words", "small-words"))
    four = ("uniform", "penultimate", "depth", "depth-kv")
    assert [job.name for job in words] == [f"{arm}-seed{seed}" for seed in range(5) for arm in four]
    assert {job.name for job in large} == {job.name for job in small}
    (scoring,) = (
        stage.command
        for stage in stages(words[0], StudyArguments(scale="words", out=tmp_path))
        if "words" in stage.command
    )
    assert scoring[:2] == ("evaluate", "words")
    for scale, batch in (("toy", "110"), ("words", "133"), ("small", "506"), ("small-words", "506")):
        args = StudyArguments(scale=scale, out=tmp_path, arms=("time",), seeds=1)
        (job,) = jobs(args)
        rest = [stage for stage in stages(job, args) if stage.what not in ("training", "measuring the loss")]
        assert {stage.command[stage.command.index("--batch") + 1] for stage in rest} == {batch}
        assert {stage.command[stage.command.index("--guidance") + 1] for stage in rest} == {"3.0"}


def test_gates_get_the_requested_clocks(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("time", "depth"), clocks=("shifted:0.05",))
    clocked, plain = ([stage.command for stage in stages(job, args)][1:] for job in jobs(args))
    assert ["--clock" in command for command in clocked] == [False, False, True]
    assert clocked[2][-2:] == ("--clock", "shifted:0.05")
    assert len(plain) == 2
    assert evaluation_folder(args, jobs(args)[0], "shifted:0.05").name == "time-seed0-shifted-0.05"


def test_clocks_are_calibrated_on_other_prompts_than_those_that_are_scored(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("time",), clocks=("calibrated",))
    (job,) = jobs(args)
    commands = {stage.what: stage.command for stage in stages(job, args)}
    calibrated = commands["calibrating"][commands["calibrating"].index("--seed") + 1]
    assert "--prompt-seed" not in commands["scoring"]
    assert int(calibrated) != ShapesArguments(model=tmp_path, out=tmp_path).prompt_seed


def test_runs_share_a_gpu_up_to_the_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, toy = (StudyArguments(scale=scale, out=tmp_path) for scale in ("small", "toy"))

    def on(gpus: int, cores: int, args: StudyArguments) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
        return runner.study_devices(args)

    assert on(1, 16, small) == ["cuda:0"] * 4
    assert on(1, 9, small) == ["cuda:0"] * 2
    assert on(2, 16, small) == ["cuda:0", "cuda:1"] * 2
    assert on(2, 2, small) == on(2, 64, toy) == ["cuda:0", "cuda:1"]
    assert on(0, 64, small) == ["cpu"]
    asked = StudyArguments(scale="toy", out=tmp_path, devices=("cuda:1", "cpu"))
    assert on(2, 2, asked) == ["cuda:1", "cpu"]
    with pytest.raises(ValueError, match="no device 'cuda:1' here; known: cpu, cuda:0"):
        on(1, 2, asked)


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cpu", None, ""), ("cuda:1", None, "1"), ("cpu", "3,5", ""), ("cuda:1", "3,5", "5")],
)
def test_a_run_sees_only_its_own_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, expected: str
) -> None:
    seen = []

    class Fails:
        """A process that notes its environment and fails at once."""

        def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(subprocess, "Popen", Fails)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(TrainingFailed, match=r"2 of 2 runs failed, the first depth-seed0 while training: exit code 1"):
        run_study(StudyArguments(scale="toy", out=tmp_path, arms=("depth", "uniform"), devices=(device,)))
    assert seen == [expected] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": ("B1", "penultimate")}, "name each arm once"),
        ({"arms": ("depht",)}, "unknown arm 'depht'"),
        ({"seeds": 0}, "at least 1"),
        ({"arms": ("S2:0",)}, "'S2:0' is not an arm with a number of seeds; write it as S2:2"),
        ({"arms": ("S2:2", "B1:3")}, "give it at least as many seeds as the others"),
        ({"clocks": ("nominal",)}, "scores with the nominal clock"),
        ({"clocks": ("shfited",)}, "unknown clock 'shfited'"),
        ({"router_rates": (0.0,)}, "above 0"),
        ({"router_rates": (float("inf"),)}, "finite numbers"),
    ],
)
def test_impossible_studies(tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyArguments(scale="toy", out=tmp_path, **wrong)


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.31, 0.35, 0.28, 0.4]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert over_seeds(values) == pytest.approx((low, high))
    assert over_seeds([0.3]) is None


def records(correct: list[int]) -> list[Record]:
    return [
        Record(prompt=i, id=f"{i:05d}", image=0, caption="", tags=(("colors", "scene")[i % 2],), file="",
               scores={CORRECT: float(right)}, reason="")
        for i, right in enumerate(correct)
    ]  # fmt: skip


def write_scores(args: StudyArguments, correct: dict[str, list[list[int]]]) -> None:
    """Write the records of every run: by arm, then by seed."""
    for job in jobs(args):
        found = records(correct[job.arm][job.seed])
        write_kept(args, job, dict.fromkeys(("", *job.clocks), found), None)


def test_differences_are_paired_by_prompt_and_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = [rng.integers(0, 2, 400).tolist() for _ in range(2)]
    better = [[max(value, int(i % 10 == 0)) for i, value in enumerate(seed)] for seed in base]
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "static", "depth"), seeds=2)
    write_scores(args, {"uniform": base, "static": base, "depth": better})
    baseline, equal, row = read_rows(args)
    assert (baseline.name, baseline.difference) == ("uniform", {})
    assert set(row.accuracy) == {"overall", "colors", "scene"}
    assert row.accuracy["overall"].seeds == pytest.approx([np.mean(seed) for seed in better])
    assert row.accuracy["scene"].mean == pytest.approx(np.mean([seed[1::2] for seed in better]))
    found = row.difference["overall"]
    gains = [np.mean(b) - np.mean(a) for a, b in zip(base, better, strict=True)]
    assert found.seeds == pytest.approx(gains)
    assert found.mean == pytest.approx(np.mean(gains))
    # At most a tenth of the prompts differ: pairing makes the interval far narrower than that of two separate shares.
    deviation = np.std([np.mean([b[i] - a[i] for a, b in zip(base, better, strict=True)]) for i in range(400)])
    width = found.over_prompts[1] - found.over_prompts[0]
    assert width == pytest.approx(2 * 1.96 * deviation / 20, rel=0.1)
    assert found.p is not None
    assert found.p < 0.001
    same = equal.difference["overall"]
    assert (same.mean, same.over_prompts, same.over_seeds, same.p) == (0, (0, 0), (0, 0), 1)


def test_arms_with_fewer_seeds_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "depth", "static:1"), seeds=2)
    assert [job.name for job in jobs(args)] == ["uniform-seed0", "depth-seed0", "static-seed0", "uniform-seed1",
                                                "depth-seed1"]  # fmt: skip
    write_scores(args, {"uniform": [[0, 0], [1, 1]], "depth": [[1, 0], [1, 1]], "static": [[1, 1]]})
    static = read_rows(args)[2]
    assert static.accuracy["overall"].seeds == (1,)
    assert static.difference["overall"].seeds == (1,)
    found = {pair: numbers["overall"].seeds for pair, numbers in read_pairs(args).items()}
    assert found == {("depth", "uniform"): (0.5, 0), ("static", "uniform"): (1,), ("static", "depth"): (0.5,)}


def test_a_run_that_was_kept_is_finished_without_its_folder(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "time"), devices=("cpu",))
    write_scores(args, {"uniform": [[0, 1]], "time": [[1, 1]]})
    uniform, timed = jobs(args)
    write_kept(args, timed, {"": records([1, 1])}, np.full((21, 6, 8), 1 / 8))
    assert is_kept(args, uniform)
    assert not is_kept(args, timed)  # its clocks are to be scored
    assert np.array_equal(kept_weights(args, timed), np.full((21, 6, 8), 1 / 8))  # type: ignore[arg-type]
    assert kept_weights(args, uniform) is None
    run_study(replace(args, arms=("uniform",), n=2))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="was scored on 2 prompts; give --n 2 or choose another --out"):
        run_study(replace(args, arms=("uniform",), n=3))


def test_losses_are_compared_where_every_run_has_them(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "depth"), seeds=2)
    losses = {"uniform": [0.2, 0.4, 0.2, 0.4], "depth": [0.1, 0.4, 0.1, 0.4]}
    for job in jobs(args):
        write_kept(args, job, {"": records([1, 0, 1, 0])}, None, losses=losses[job.arm])
    uniform, depth = read_rows(args)
    assert (uniform.loss["overall"].mean, uniform.loss_difference) == (pytest.approx(0.3), {})
    assert depth.loss_difference["overall"].seeds == pytest.approx([-0.05, -0.05])
    assert depth.loss_difference["colors"].mean == pytest.approx(-0.1)
    last = dict(sections([uniform, depth], {}, {}))["Table 5: velocity loss on held-out pictures (thousandths)"]
    assert last.rows[1][:2] == ("S2 depth", "250.00 [100.00 to 400.00; 250.00 to 250.00]")
    write_kept(args, jobs(args)[-1], {"": records([1, 0, 1, 0])}, None)  # by an earlier version
    uniform, depth = read_rows(args)
    assert uniform.loss
    assert not depth.loss
    assert not [title for title, _ in sections([uniform, depth], {}, {}) if "loss" in title]


def test_another_clock_is_compared_with_the_nominal_one_of_its_own_arm(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "time"), clocks=("shifted",))
    write_scores(args, {"uniform": [[0, 0, 0, 0]], "time": [[1, 1, 0, 0]]})
    scored = {"": records([1, 1, 0, 0]), "shifted": records([1, 1, 1, 0])}
    write_kept(args, jobs(args)[1], scored, None)
    found = {row.name: row.difference["overall"].mean for row in read_rows(args) if row.difference}
    assert found == {"time": 0.5, "time, shifted clock": 0.25}


def test_scores_of_different_prompts_are_refused(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "depth"))
    write_scores(args, {"uniform": [[1, 0, 1, 0]], "depth": [[1, 0, 1]]})
    with pytest.raises(ValueError, match="scored on different prompts: score them all with the same --n"):
        read_rows(args)


def number(mean: float, p: float | None = None, over_seeds: tuple[float, float] | None = None) -> Number:
    return Number(mean=mean, seeds=(mean,), over_prompts=(mean - 0.1, mean + 0.1), over_seeds=over_seeds, p=p)


def test_tables_show_every_number_in_markdown_and_html() -> None:
    accuracy = {"overall": number(0.5), "geneval": number(0.4), "two_object": number(0.3)}
    better = {"overall": number(0.02, p=0.0312, over_seeds=(-0.1, 0.14))}
    rows = [
        Row(variant="uniform", arm="uniform", clock="", accuracy=accuracy, difference={}),
        Row(variant="joint-rate10", arm="joint", clock="", accuracy=accuracy, difference=better),
        Row(variant="joint", arm="joint", clock="a<b", accuracy=accuracy, difference=better),
    ]
    pairs = {("depth", "uniform"): {"overall": number(0.01)}, ("joint", "uniform"): {"overall": number(-0.02)}}
    parts = sections(rows, pairs, {"joint": 0.91234})
    first, skills, clocks, differences, stability, method, judging = [
        part.splitlines() for part in to_markdown(parts).replace("\n\n\n", "\n\n").split("\n\n") if part[0] != "#"
    ]
    assert first == [
        "| | all images | mean of the six GenEval tags | overall minus uniform | p |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| B2 uniform | 50.0 [40.0 to 60.0] | 40.0 [30.0 to 50.0] |  |  |",
        "| S3 joint-rate10 | 50.0 [40.0 to 60.0] | 40.0 [30.0 to 50.0] "
        "| +2.0 [-8.0 to +12.0; -10.0 to +14.0] | 0.0312 |",
    ]
    assert skills[::2] == [
        "| | B2 uniform | S3 joint-rate10 |",
        "| two object | 30.0 [20.0 to 40.0] | 30.0 [20.0 to 40.0] |",
    ]
    assert clocks[2].startswith("| S3 joint, a<b clock | 50.0 [40.0 to 60.0] | +2.0 [")
    assert differences[::2] == ["| | all images |", "| depth minus uniform | +1.0 [-9.0 to +11.0] |"]
    assert stability == ["| arm | similarity |", "| --- | ---: |", "| joint | 0.9123 |"]
    assert method[0].startswith("Accuracies in percent")
    assert judging[0].startswith("A claim holds if")
    html = to_html(parts)
    assert "<td>S3 joint, a&lt;b clock</td><td>50.0 [40.0 to 60.0]</td>" in html
    assert [html.count(mark) for mark in ("<h2>", "<table>", "<tr>", "<p ")] == [5, 5, 3 + 2 + 2 + 3 + 2, 2]


@pytest.fixture
def tiny_study(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StudyArguments:
    monkeypatch.setitem(plan.RECIPES, "toy", lambda arm: tiny_config(arm, steps=2, checkpoint_every=2))
    few = replace(plan.SCALES["toy"], sampling=replace(plan.SCALES["toy"].sampling, steps=2))
    monkeypatch.setitem(plan.SCALES, "toy", few)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than everything else
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    arms = ("uniform", "depth")
    return StudyArguments(scale="toy", out=tmp_path / "study", arms=arms, n=11, devices=("cpu",))


def forked(command: list[str], *, env: dict[str, str], stdout: IO[bytes], **_: object) -> SimpleNamespace:
    """Take the place of Popen: a process that need not import torch again."""
    assert command[1:3] == ["-m", "semantic_routing"]
    process = Forked(MAIN, tuple(command[3:]), env, Path(stdout.name)).process
    return SimpleNamespace(poll=lambda: process.exitcode)


@pytest.mark.parametrize("start", [forked, pytest.param(subprocess.Popen, marks=pytest.mark.stress)])
def test_a_study_runs_to_its_page_and_then_has_nothing_left_to_do(
    start: Callable[..., object], tiny_study: StudyArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    out = tiny_study.out
    run_study(tiny_study)
    page = write_results(tiny_study)
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert [row["variant"] for row in rows] == ["uniform", "depth"]
    shares = [
        json.loads((out / "evaluations" / f"{arm}-seed0" / "summary.json").read_text()) for arm in tiny_study.arms
    ]
    for row, summary in zip(rows, shares, strict=True):
        assert row["accuracy"]["overall"]["mean"] == pytest.approx(summary["accuracy"]["overall"])
    gain = shares[1]["accuracy"]["overall"] - shares[0]["accuracy"]["overall"]
    assert rows[1]["difference"]["overall"]["mean"] == pytest.approx(gain)
    losses = [
        [r.scores[LOSS] for r in read_records(out / "losses" / f"{arm}-seed0" / RECORDS)] for arm in tiny_study.arms
    ]
    assert rows[0]["loss"]["overall"]["mean"] == pytest.approx(np.mean(losses[0]), abs=1e-6)
    lower = np.mean(losses[1]) - np.mean(losses[0])
    assert rows[1]["loss_difference"]["overall"]["mean"] == pytest.approx(lower, abs=2e-7)
    judged = {found["inequality"]: found for found in results["claims"]}
    assert judged["S2 - B2 > 0"]["number"]["mean"] == pytest.approx(gain)
    assert judged["S2 - B2 > 0"]["verdict"] == "undecided"  # one run
    assert judged["B2 - B1 > 0"]["to_decide"] == "B1 in --arms"
    text = (out / "tables.md").read_text()
    assert "B2 uniform" in text
    assert "S2 depth" in text
    assert "Table 5: velocity loss on held-out pictures" in text
    assert page.read_text().count("<table>") == 5
    assert (out / "figures" / "accuracy.png").is_file()
    written = [path for name in ("runs", "evaluations", "logs") for path in (out / name).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in written}
    run_study(tiny_study)
    assert {path: path.stat().st_mtime_ns for path in written} == before
    with pytest.raises(ValueError, match="uniform-seed0 was scored on 11 prompts; give --n 11 or choose another"):
        run_study(replace(tiny_study, n=22))


def test_intervals_of_too_few_prompts_are_left_out() -> None:
    """Resamples without a prompt of a tag have no mean; JSON and tables have no word for that."""
    nan = float("nan")
    number = Number(mean=0.5, seeds=(0.4, 0.6), over_prompts=(nan, nan), over_seeds=(0.3, 0.7))
    row = Row(variant="depth", arm="depth", clock="", accuracy={"overall": number}, difference={})
    text = results_json([row], {}, {})
    assert json.loads(text)["rows"][0]["accuracy"]["overall"]["interval_over_prompts"] == [None, None]
    assert _number(number) == "50.0 [30.0 to 70.0]"


def test_a_run_whose_results_are_damaged_has_failed_and_the_others_go_on(
    tiny_study: StudyArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def keep(args: StudyArguments, job: plan.Job) -> None:
        if job.arm == "uniform":
            raise ValueError("cannot read records.jsonl")
        kept.append(job.arm)

    monkeypatch.setattr(runner, "stages", lambda job, args: ())
    monkeypatch.setattr(runner, "keep", keep)
    with pytest.raises(TrainingFailed, match="1 of 2 runs failed, the first uniform-seed0 while storing its results"):
        run_study(tiny_study)
    assert kept == ["depth"]


def test_a_run_that_fails_is_named_with_its_log(tiny_study: StudyArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**plan.RECIPES}["toy"]
    monkeypatch.setitem(plan.RECIPES, "toy", lambda arm: replace(broken(arm), image_size=33))
    with pytest.raises(TrainingFailed, match=r"1 of 1 runs failed, the first uniform-seed0 while training: .*33 x 33"):
        run_study(replace(tiny_study, arms=("uniform",)))
