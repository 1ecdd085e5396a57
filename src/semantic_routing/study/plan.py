"""What a study runs: which arms, seeds and variants, each as commands that can be given by hand as well."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantic_routing.common.config import to_dict
from semantic_routing.model.arms import ARMS, PAPER_ARMS, parse_arm
from semantic_routing.sampling.clock import parse_clock
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import RECIPES, SMALL_SAMPLING, TOY_SAMPLING

CALIBRATED = "calibrated"
"""The clock that is measured for each run."""
CALIBRATION = ("--n", "128", "--seed", "1")
"""What measures it: other prompts, from other noise, than those that score."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a study of a recipe does where it is told nothing else."""

    arms: tuple[str, ...]
    seeds: int
    sampling: SampleConfig
    """How the images are sampled that score a run."""
    at_once: int
    """Runs that share a GPU, which small networks do not fill."""

    @property
    def calibration(self) -> str:
        """What semroute analyze writes for the sampler that scores the models."""
        return f"calibration-g{self.sampling.guidance:g}-s{self.sampling.steps}.json"


SCALES = {
    "toy": Scale(arms=("penultimate", "uniform", "depth"), seeds=1, sampling=TOY_SAMPLING, at_once=1),
    "small": Scale(arms=PAPER_ARMS, seeds=3, sampling=SMALL_SAMPLING, at_once=4),
}


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Train and score every arm at equal budget, data order and noise, and set them beside each other."""

    scale: Annotated[Literal["toy", "small"], tyro.conf.Positional]
    """The recipe of the runs: toy is minutes a run on two CPU cores, small the whole comparison on one GPU."""
    out: Path
    """Folder of the runs, evaluations and results; a stopped study goes on."""
    arms: tuple[str, ...] = ()
    """Strategies, by name or by the paper's label; the first is what the others are compared with. By default
    penultimate, uniform and depth at scale toy, all seven of the paper at scale small."""
    seeds: int | None = None
    """Runs of each arm, by default 1 at scale toy and 3 at scale small; a seed decides initial weights, data order,
    noise, times and dropout for all arms alike."""
    steps: int | None = None
    """Training steps of each run, if not the recipe's."""
    n: int = 2530
    """Prompts that score a run, spread evenly over the eleven tags: the standard error is below a point."""
    router_rates: tuple[float, ...] = (1.0,)
    """Learning rates of the routers, in multiples of the recipe's; with several, each learned arm runs with each."""
    clocks: tuple[str, ...] = ("shifted", CALIBRATED)
    """What the gates of S1 and S3 are told for another score: shifted (Eq. 11), shifted:SIZE, a file of times, or
    calibrated, which measures a file for each run."""
    devices: tuple[str, ...] = ()
    """Devices that runs are spread over, such as cuda:0 cuda:1; by default all GPUs, or the CPU. "cpu cpu" runs two at
    a time, each on half of the cores: for small networks that is faster than all cores for one."""

    def __post_init__(self) -> None:
        given = [value for value in (self.seeds, self.n, self.steps) if value is not None]
        if min(given) < 1:
            raise ValueError("seeds, n and steps must be at least 1")
        arms = self.all_arms
        if len(set(arms)) < len(arms):
            raise ValueError("a study needs arms, each named once")
        for clock in self.clocks:
            if clock != CALIBRATED and parse_clock(clock) is None:
                raise ValueError("every study has the nominal clock; name others")
        if not self.router_rates or not all(0 < rate < math.inf for rate in self.router_rates):
            raise ValueError("router_rates are multiples of a learning rate, above 0")

    @property
    def all_arms(self) -> tuple[str, ...]:
        """The strategies by their names."""
        return tuple(map(parse_arm, self.arms or SCALES[self.scale].arms))

    @property
    def all_seeds(self) -> range:
        """The seed of each run of an arm."""
        return range(self.seeds or SCALES[self.scale].seeds)


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
    for seed in args.all_seeds:
        for arm in args.all_arms:
            recipe = RECIPES[args.scale](arm)
            for rate in args.router_rates if ARMS[arm].learned else (1.0,):
                optim = recipe.optim
                if rate != 1:
                    own = optim.lr if optim.router_lr is None else optim.router_lr
                    optim = replace(optim, router_lr=own * rate)
                config = replace(recipe, optim=optim, seed=seed, steps=args.steps or recipe.steps, preview_every=0)
                clocks = args.clocks if ARMS[arm].takes_clock else ()
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
    if CALIBRATED in job.clocks:
        how = SCALES[args.scale].sampling
        command = ["analyze", str(run), "--out", str(_calibration(job, args).parent), "--trajectory"]
        command += [*CALIBRATION, *_options(how)]
        yield Stage("calibrating", tuple(command), _calibration(job, args))
    for clock in job.clocks:
        yield _evaluation(job, args, clock)


def evaluation_folder(args: StudyArguments, job: Job, clock: str = "") -> Path:
    """Where the scores of a run are, under a clock other than the nominal one if it is named."""
    told = re.sub(r"[^\w.-]+", "-", clock)
    return args.out / "evaluations" / (f"{job.name}-{told}" if clock else job.name)


def _calibration(job: Job, args: StudyArguments) -> Path:
    """The measured times of a run's own gate."""
    return args.out / "trajectories" / job.name / SCALES[args.scale].calibration


def _evaluation(job: Job, args: StudyArguments, clock: str) -> Stage:
    folder = evaluation_folder(args, job, clock)
    told = str(_calibration(job, args)) if clock == CALIBRATED else clock
    command = ["evaluate", "shapes", "--model", str(args.out / "runs" / job.name), "--out", str(folder)]
    command += ["--n", str(args.n), *_options(SCALES[args.scale].sampling), "--compile"]
    command += ["--clock", told] if clock else []
    return Stage(f"scoring, {clock} clock" if clock else "scoring", tuple(command), folder / "summary.json")


def _options(how: SampleConfig) -> list[str]:
    """A way of sampling as options of semroute evaluate and analyze."""
    names = ("sampler", "steps", "guidance", "shift", "batch")
    return [word for name in names for word in (f"--{name}", str(getattr(how, name)))]


def config_text(job: Job) -> str:
    """The run's whole configuration, as ``semroute train --config`` reads it."""
    return json.dumps(to_dict(job.config), indent=2) + "\n"
