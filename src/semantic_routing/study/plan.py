"""What a study runs: which arms, seeds and variants, each as commands that can be given by hand as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantic_routing.config import to_dict
from semantic_routing.fusion import parse_arm
from semantic_routing.recipes import RECIPES, TOY_SAMPLING
from semantic_routing.train_config import TrainConfig

TIMED = ("time", "joint")
"""Arms whose gates can be told another time while sampling (Table 3)."""
LEARNED = ("static", "depth", "time", "joint", "attention", "time-state", "joint-state")
"""Arms whose routers have parameters, and so a learning rate of their own."""
CALIBRATION = f"calibration-g{TOY_SAMPLING.guidance:g}-s{TOY_SAMPLING.steps}.json"
"""What semroute analyze writes for the sampler that scores the models."""


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Train and score every arm at equal budget, data order and noise, and set them beside each other."""

    scale: Annotated[Literal["toy"], tyro.conf.Positional]
    """The recipe of the runs; toy is minutes a run on two CPU cores."""
    out: Path
    """Folder of the runs, evaluations and results; a stopped study goes on."""
    arms: tuple[str, ...] = ("penultimate", "uniform", "depth")
    """Strategies, by name or by the paper's label; the first is what the others are compared with."""
    seeds: int = 1
    """Runs of each arm; a seed decides initial weights, data order, noise, times and dropout for all arms alike."""
    steps: int | None = None
    """Training steps of each run, if not the recipe's."""
    n: int = 2530
    """Prompts that score a run, spread evenly over the eleven tags: the standard error is below a point."""
    router_rates: tuple[float, ...] = (1.0,)
    """Learning rates of the routers, in multiples of the recipe's; with several, each learned arm runs with each."""
    clocks: bool = True
    """Score S1 and S3 also with the gate's time shifted (Eq. 11) and calibrated."""
    devices: tuple[str, ...] = ()
    """Devices that runs are spread over, such as cuda:0 cuda:1; by default all GPUs, or the CPU. "cpu cpu" runs two at
    a time, each on half of the cores: for small networks that is faster than all cores for one."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.n < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError("seeds, n and steps must be at least 1")
        arms = [parse_arm(arm) for arm in self.arms]
        if not arms or len(set(arms)) < len(arms):
            raise ValueError("a study needs arms, each named once")
        if not self.router_rates or min(self.router_rates) <= 0:
            raise ValueError("router_rates are multiples of a learning rate, above 0")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: trained, then scored once for each clock."""

    arm: str
    rate: float
    """Multiple of the router's learning rate."""
    seed: int
    config: TrainConfig
    clocks: tuple[str, ...] = ()
    """Clocks besides the nominal one."""

    @property
    def variant(self) -> str:
        """The arm, with the router's rate where it is not the recipe's."""
        return self.arm if self.rate == 1 else f"{self.arm}-rate{self.rate:g}"

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Stage:
    """A command of the program, done when its file is there."""

    what: str
    command: tuple[str, ...]
    done: Path


def jobs(args: StudyArguments) -> list[Job]:
    """Every run of the study: seed by seed, so that a study that is stopped has compared all arms."""
    found = []
    for seed in range(args.seeds):
        for arm in map(parse_arm, args.arms):
            recipe = RECIPES[args.scale](arm)
            for rate in args.router_rates if arm in LEARNED else (1.0,):
                optim = recipe.optim if rate == 1 else replace(recipe.optim, router_lr=recipe.optim.lr * rate)
                config = replace(recipe, optim=optim, seed=seed, steps=args.steps or recipe.steps, preview_every=0)
                clocks = ("shifted", "calibrated") if args.clocks and arm in TIMED else ()
                found.append(Job(arm=arm, rate=rate, seed=seed, config=config, clocks=clocks))
    return found


def stages(job: Job, args: StudyArguments) -> Iterator[Stage]:
    """The commands of a run, in order. Sampling is paired: prompts and noise are the same for all runs."""
    run, out = args.out / "runs" / job.name, args.out
    config = out / "configs" / f"{job.name}.json"
    last = run / "checkpoints" / f"step-{job.config.steps:07d}"
    if (run / "config.json").is_file() and any((run / "checkpoints").glob("step-*")):
        yield Stage("training", ("train", "--resume", str(run)), last)
    else:
        yield Stage("training", ("train", "--config", str(config), "--out", str(run)), last)
    yield _evaluation(job, args, "")
    if "calibrated" in job.clocks:
        figures = out / "trajectories" / job.name
        settings = ("--guidance", f"{TOY_SAMPLING.guidance:g}", "--steps", str(TOY_SAMPLING.steps), "--n", "128")
        how = ("--sampler", TOY_SAMPLING.sampler, "--shift", f"{TOY_SAMPLING.shift:g}")
        command = ("analyze", str(run), "--out", str(figures), "--trajectory", *settings, *how)
        yield Stage("calibrating", command, figures / CALIBRATION)
    for clock in job.clocks:
        yield _evaluation(job, args, clock)


def evaluation_folder(args: StudyArguments, job: Job, clock: str = "") -> Path:
    """Where the scores of a run are, under a clock other than the nominal one if it is named."""
    return args.out / "evaluations" / (f"{job.name}-{clock}" if clock else job.name)


def _evaluation(job: Job, args: StudyArguments, clock: str) -> Stage:
    folder = evaluation_folder(args, job, clock)
    told = str(args.out / "trajectories" / job.name / CALIBRATION) if clock == "calibrated" else clock
    command = ["evaluate", "shapes", "--model", str(args.out / "runs" / job.name), "--out", str(folder)]
    command += ["--n", str(args.n), "--batch", str(TOY_SAMPLING.batch), "--compile"]
    command += ["--clock", told] if clock else []
    return Stage(f"scoring, {clock} clock" if clock else "scoring", tuple(command), folder / "summary.json")


def config_text(job: Job) -> str:
    """The run's whole configuration, as ``semroute train --config`` reads it."""
    return json.dumps(to_dict(job.config), indent=2) + "\n"
