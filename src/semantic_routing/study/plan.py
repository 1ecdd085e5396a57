"""The runs of a study: arms, seeds and variants, each as commands of the program."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantic_routing.analysis.trajectory import LEAD
from semantic_routing.common.config import to_dict
from semantic_routing.evaluation.records import LOSS, SUMMARY
from semantic_routing.model.arms import ARMS, PAPER_ARMS, parse_arm
from semantic_routing.sampling.clock import parse_clock
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.toy.worlds import SHAPES, WORLDS
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import RECIPES, SMALL_SAMPLING, TOY_SAMPLING, WORDS_SAMPLING

CALIBRATED = "calibrated"
"""Name of the clock that is measured for each run."""
CALIBRATION = ("--n", "128", "--seed", "1")
"""Options of that measurement: prompts and noise differ from those of the scores."""

LOSS_TIMES = (0.03, 0.06, 0.09, 0.13, 0.18, 0.24, 0.34, 0.52)
"""Times of the losses on held-out pictures: the middles of eight equal shares of the recipes' training times."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Defaults of a study, by recipe."""

    arms: tuple[str, ...]
    """As ``StudyArguments.arms``."""
    seeds: int
    sampling: SampleConfig
    """Sampling of the images that are scored."""
    at_once: int
    """Largest number of runs that share a GPU: small networks do not fill one."""

    @property
    def calibration(self) -> str:
        """File that semroute analyze writes for this sampling."""
        return f"calibration-g{self.sampling.guidance:g}-s{self.sampling.steps}.json"


SCALES = {
    "toy": Scale(arms=("penultimate", "uniform", "depth"), seeds=1, sampling=TOY_SAMPLING, at_once=1),
    "words": Scale(arms=("uniform", "penultimate", "depth", "depth-kv"), seeds=5, sampling=WORDS_SAMPLING, at_once=1),
    "small": Scale(arms=PAPER_ARMS, seeds=3, sampling=SMALL_SAMPLING, at_once=4),
    "small-words": Scale(arms=PAPER_ARMS, seeds=3, sampling=SMALL_SAMPLING, at_once=2),
}


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Train and score every arm with the same budget, data order and noise, and compare them."""

    scale: Annotated[Literal["toy", "words", "small", "small-words"], tyro.conf.Positional]
    """Recipe of the runs: with toy and words a run takes minutes on two CPU cores; small and small-words, on the
    same two worlds, compare all arms on one GPU."""
    out: Path
    """Folder of the runs, evaluations and results. A stopped study resumes there."""
    arms: tuple[str, ...] = ()
    """Routing strategies by name or by the paper's label, such as S2, or B3:2 for two seeds of it; the first is the
    baseline. By default penultimate, uniform and depth at scale toy, uniform, penultimate, depth and depth-kv at
    scale words, and all seven of the paper at the others."""
    seeds: int | None = None
    """Number of runs of each arm without a number of its own, by default 1 at scale toy, 5 at scale words and 3 at
    the others. A seed sets initial weights, data order, noise, times and dropout; they are the same for all
    arms."""
    steps: int | None = None
    """Training steps of each run, by default those of the recipe."""
    n: int = 2530
    """Number of prompts that score each run, spread evenly over the eleven tags; by default enough for a standard
    error below one percentage point."""
    router_rates: tuple[float, ...] = (1.0,)
    """Learning rates of the routers, as multiples of the recipe's; each learned arm is trained with each of them."""
    clocks: tuple[str, ...] = ("shifted", CALIBRATED)
    """Clocks for additional scores of S1 and S3: times for the gates instead of the nominal one. They are shifted
    (Eq. 11), shifted:SIZE, a file of times, or calibrated, which measures a file for each run."""
    devices: tuple[str, ...] = ()
    """Devices of the runs, such as cuda:0 cuda:1; by default all GPUs, or the CPU. "cpu cpu" runs two at a time,
    each on half of the cores, which for small networks is faster than one at a time."""

    def __post_init__(self) -> None:
        given = [value for value in (self.seeds, self.n, self.steps) if value is not None]
        if min(given) < 1:
            raise ValueError("seeds, n and steps must be at least 1")
        if len(self.all_arms) < len(self._arms):
            raise ValueError("an arm is given twice; name each arm once")
        if self.seeds_of[self.all_arms[0]] < max(self.seeds_of.values()):
            raise ValueError("the first arm is the baseline: give it at least as many seeds as the others")
        for clock in self.clocks:
            if clock != CALIBRATED and parse_clock(clock) is None:
                raise ValueError("every study scores with the nominal clock anyway; give --clocks only others")
        if not self.router_rates or not all(0 < rate < math.inf for rate in self.router_rates):
            raise ValueError("router_rates must be finite numbers above 0: multiples of the recipe's rate")

    @property
    def _arms(self) -> tuple[str, ...]:
        return self.arms or SCALES[self.scale].arms

    @property
    def seeds_of(self) -> dict[str, int]:
        """Number of seeds of each strategy by its name."""
        found = {}
        for arm in self._arms:
            name, _, count = arm.partition(":")
            if ":" in arm and not (count.isdecimal() and int(count)):
                raise ValueError(f"{arm!r} is not an arm with a number of seeds; write it as {name or 'B3'}:2")
            found[parse_arm(name)] = int(count) if count else self.seeds or SCALES[self.scale].seeds
        return found

    @property
    def all_arms(self) -> tuple[str, ...]:
        """Names of the strategies."""
        return tuple(self.seeds_of)

    @property
    def all_seeds(self) -> range:
        """Seeds of the runs of the baseline, which has the most."""
        return range(max(self.seeds_of.values()))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: trained, then scored once for each clock."""

    arm: str
    rate: float
    """Router's learning rate, as a multiple of the recipe's."""
    seed: int
    config: TrainConfig
    clocks: tuple[str, ...] = ()
    """Clocks besides the nominal one."""

    @property
    def variant(self) -> str:
        """Name of the arm, with the router's rate unless it is the recipe's."""
        return self.arm if self.rate == 1 else f"{self.arm}-rate{self.rate:g}"

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Stage:
    """A command of the program; it is done when its file exists."""

    what: str
    command: tuple[str, ...]
    done: Path


def jobs(args: StudyArguments) -> list[Job]:
    """Return every run, seed by seed, so that even a study that is stopped early compares all arms."""
    found = []
    for seed in args.all_seeds:
        for arm in (arm for arm, seeds in args.seeds_of.items() if seed < seeds):
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
    """Yield the commands of a run in order. Prompts and sampling noise are the same for all runs."""
    run, out = args.out / "runs" / job.name, args.out
    config = out / "configs" / f"{job.name}.json"
    last = run / "checkpoints" / f"step-{job.config.steps:07d}"
    if (run / "config.json").is_file() and any((run / "checkpoints").glob("step-*")):
        yield Stage("training", ("train", "--resume", str(run)), last)
    else:
        yield Stage("training", ("train", "--config", str(config), "--out", str(run)), last)
    yield _evaluation(job, args, "")
    losses = loss_folder(args, job)
    command = ["evaluate", LOSS, "--model", str(run), "--out", str(losses), "--n", str(args.n), "--times"]
    yield Stage("measuring the loss", (*command, *map(str, LOSS_TIMES)), losses / SUMMARY)
    if CALIBRATED in job.clocks:
        how = SCALES[args.scale].sampling
        command = ["analyze", str(run), "--out", str(trajectory_folder(args, job)), "--trajectory"]
        command += [*CALIBRATION, *_options(how)]
        yield Stage("calibrating", tuple(command), trajectory_folder(args, job) / LEAD)  # written last
    for clock in job.clocks:
        yield _evaluation(job, args, clock)


def evaluation_folder(args: StudyArguments, job: Job, clock: str = "") -> Path:
    """Return the folder of a run's scores; ``clock`` "" is the nominal one."""
    name = re.sub(r"[^\w.-]+", "-", clock)
    return args.out / "evaluations" / (f"{job.name}-{name}" if clock else job.name)


def loss_folder(args: StudyArguments, job: Job) -> Path:
    """Return the folder of a run's losses on held-out pictures."""
    return args.out / "losses" / job.name


def trajectory_folder(args: StudyArguments, job: Job) -> Path:
    """Return the folder of the analysis that measures a run's times."""
    return args.out / "trajectories" / job.name


def _calibration(job: Job, args: StudyArguments) -> Path:
    """Return the file of a run's measured times."""
    return trajectory_folder(args, job) / SCALES[args.scale].calibration


def _evaluation(job: Job, args: StudyArguments, clock: str) -> Stage:
    folder = evaluation_folder(args, job, clock)
    value = str(_calibration(job, args)) if clock == CALIBRATED else clock
    world = next((path for path in job.config.data.paths if path in WORLDS), SHAPES)
    command = ["evaluate", world, "--model", str(args.out / "runs" / job.name), "--out", str(folder)]
    command += ["--n", str(args.n), *_options(SCALES[args.scale].sampling), "--compile"]
    command += ["--clock", value] if clock else []
    return Stage(f"scoring, {clock} clock" if clock else "scoring", tuple(command), folder / "summary.json")


def _options(how: SampleConfig) -> list[str]:
    """Return sampling settings as options of semroute evaluate and analyze."""
    names = ("sampler", "steps", "guidance", "shift", "batch")
    return [word for name in names for word in (f"--{name}", str(getattr(how, name)))]


def config_text(job: Job) -> str:
    """Return the configuration of a run in the format of ``semroute train --config``."""
    return json.dumps(to_dict(job.config), indent=2) + "\n"
