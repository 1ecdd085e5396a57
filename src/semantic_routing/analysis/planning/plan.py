"""The plan of a run on a number of GPUs: its layout, its step and its whole time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from semantic_routing.analysis.planning.counts import Counts
from semantic_routing.analysis.planning.hardware import GPUS, Assumptions
from semantic_routing.analysis.planning.layout import Layout, lay_out
from semantic_routing.analysis.planning.run import cost_of_one, play, random_failures, run_of
from semantic_routing.analysis.planning.step import Seconds, StepTime, seconds_of, time_step
from semantic_routing.common.config import nearest
from semantic_routing.training.config import TrainConfig

RUNS = 50
"""Runs that are simulated with random failures."""
MOST = 10_000
"""Number of failures after which a simulated run that never ends is abandoned."""
PARTS = {
    "data": ("load",),
    "language model": ("encode",),
    "autoencoder": ("codec",),
    "communication": ("gather", "scatter", "reduce"),
}
"""Parts of a step that a plan leaves out in turn, to show what each costs."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run on ``layout.gpus`` GPUs; times in seconds."""

    layout: Layout
    parts: Seconds
    step: StepTime
    without: dict[str, float]
    """The seconds of a step if one part took no time."""
    in_turn: float
    """The seconds of a step in which nothing overlaps."""
    calm: float
    """The run without failures."""
    saving: float
    """In which training waits for checkpoints, in that run."""
    write: float
    """In which one checkpoint is written in the background."""
    restart: float
    """From the end of all processes to the first step."""
    detect: float
    """From a hang to the end of all processes."""
    failures: float
    """Failures to expect during the calm time."""
    crash: float
    """What one crash adds, on average over the run."""
    hang: float
    """What one hang adds."""
    mean: float
    """The run with random failures, on average over ``RUNS`` runs."""
    worst: float
    """The longest of these runs."""

    def to_json(self, price: float | None) -> dict[str, Any]:
        """Return all numbers; the cost only with a price for a GPU hour."""
        hours = self.layout.gpus * self.mean / 3600
        cost = {} if price is None else {"cost": price * hours}
        layout = asdict(self.layout) | {"accumulate": self.layout.accumulate}
        step = asdict(self.step) | {"bottleneck": self.step.bottleneck}
        return asdict(self) | {"layout": layout, "step": step, "gpu_hours": hours} | cost


def find_gpu(name: str) -> str:
    """Return the name of a known GPU; ValueError names the nearest."""
    if name.upper() not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; {nearest(name.upper(), list(GPUS))}")
    return name.upper()


def plan(cfg: TrainConfig, counts: Counts, name: str, gpus: int, assumed: Assumptions) -> Plan:
    """Plan a run; ValueError if batch, machines or groups do not divide."""
    gpu = GPUS[find_gpu(name)]
    layout = lay_out(cfg, counts, gpu, gpus, assumed)
    parts = seconds_of(cfg, counts, layout, gpu, assumed)
    how: dict[str, Any] = {
        "depth": counts.depth,
        "accumulate": layout.accumulate,
        "buffer": max(1, cfg.data.workers) * cfg.data.ahead,
        "gathered_again": cfg.parallel.reshard_after_forward,
    }
    step = time_step(parts, **how)
    run = run_of(cfg, counts, layout, gpu, assumed, step.seconds)
    calm = play(run)
    mean = 3600 * assumed.gpu_hours_per_failure / gpus
    seeds = range(cfg.seed, cfg.seed + RUNS)
    random = [play(run, islice(random_failures(seed, mean, assumed.hang_share), MOST)).total for seed in seeds]
    crash = cost_of_one(run)
    return Plan(
        layout=layout,
        parts=parts,
        step=step,
        without={part: time_step(parts.without(*names), **how).seconds for part, names in PARTS.items()},
        in_turn=time_step(parts, **how, overlap=False).seconds,
        calm=calm.total,
        saving=calm.saving,
        write=run.write,
        restart=run.restart,
        detect=run.detect,
        failures=calm.total / mean,
        crash=crash,
        hang=crash + run.detect,
        mean=sum(random) / RUNS,
        worst=max(random),
    )


def to_json(plans: Sequence[Plan], counts: Counts, assumed: Assumptions, price: float | None) -> dict[str, Any]:
    """Return counts, assumptions and plans."""
    return {
        "counts": asdict(counts) | {"train_flops": counts.train_flops, "frozen_bytes": counts.frozen},
        "assumptions": asdict(assumed) | {"price_per_gpu_hour": price},
        "plans": [one.to_json(price) for one in plans],
    }
