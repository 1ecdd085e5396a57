"""The timeline of a whole run: steps, pauses, checkpoints written in the background, failures and restarts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from semantic_routing.analysis.planning.counts import Counts
from semantic_routing.analysis.planning.hardware import Assumptions, Gpu
from semantic_routing.analysis.planning.layout import Layout
from semantic_routing.common.distributed import PATIENCE
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.watchdog import LONGEST_POLL, POLLS

GUIDED = 2
"""Guided sampling runs the network twice a step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What happens in a run, in seconds."""

    steps: int
    step: float
    """Seconds of a step."""
    checkpoint_every: int
    copy: float = 0.0
    """Seconds in which a checkpoint is copied to host memory; training waits."""
    write: float = 0.0
    """Seconds in which it is written in the background; only then it counts."""
    pauses: tuple[tuple[int, float], ...] = ()
    """Steps between, and seconds of, pauses: samples, validation."""
    detect: float = 0.0
    """Seconds from a hang to the end of all processes by the watchdog."""
    restart: float = 0.0
    """Seconds from the end of all processes to the first step of the next."""


@dataclass(frozen=True)
class Failure:
    """A failure, or none if ``after`` is infinite."""

    after: float
    """Seconds since the start or the last restart."""
    hang: bool = False
    """Whether all processes wait until the watchdog ends them, instead of ending at once."""


@dataclass
class Account:
    """How the time of a run was spent, in seconds."""

    total: float = 0.0
    saving: float = 0.0
    """In which training waited for checkpoints: copies, earlier writes, and the last write."""
    detecting: float = 0.0
    """In which hung processes waited for the watchdog."""
    restarting: float = 0.0
    lost: float = 0.0
    """From the step of the last complete checkpoint to the failure; all of it is done again."""
    failures: int = 0


def play(run: Run, failures: Iterable[Failure] = ()) -> Account:
    """Simulate the run event by event, with these failures in their order."""
    return _Play(run, iter(failures)).play()


class _Play:
    """The state of a simulated run."""

    def __init__(self, run: Run, failures: Iterator[Failure]) -> None:
        self.run, self.failures, self.account = run, failures, Account()
        self.now = self.kept_at = 0.0
        self.step = self.kept = 0
        self.writing: tuple[int, float, float] | None = None
        """Step of the checkpoint that is being written, when its copy was made, and when it will be complete."""
        self._next_failure()

    def play(self) -> Account:
        while self.step < self.run.steps:
            if not self._advance():
                self._fail()
        if self.writing is not None:
            self.account.saving += max(0.0, self.writing[2] - self.now)
            self.now = max(self.now, self.writing[2])
        self.account.total = self.now
        return self.account

    def _advance(self) -> bool:
        """Train to the next step after which something is due, and do that; return False at a failure."""
        run = self.run
        every = [run.checkpoint_every, *(often for often, _ in run.pauses)]
        stop = min(run.steps, *((self.step // often + 1) * often for often in every))
        if not self._spend((stop - self.step) * run.step):
            return False
        if not self._spend(sum((seconds for often, seconds in run.pauses if stop % often == 0), 0.0)):
            return False
        if stop == run.steps or stop % run.checkpoint_every == 0:
            earlier = 0.0 if self.writing is None else max(0.0, self.writing[2] - self.now)
            if not self._spend(earlier + run.copy):
                return False
            self._keep()
            self.account.saving += earlier + run.copy
            self.writing = (stop, self.now, self.now + run.write)
        self.step = stop
        return True

    def _spend(self, seconds: float) -> bool:
        """Let time pass; return False if a failure comes first."""
        failed = self.now + seconds > self.fails_at
        self.now = self.fails_at if failed else self.now + seconds
        return not failed

    def _keep(self) -> None:
        """Count a checkpoint whose writing has ended."""
        if self.writing is not None and self.writing[2] <= self.now:
            (self.kept, self.kept_at, _), self.writing = self.writing, None

    def _fail(self) -> None:
        """Go back to the last complete checkpoint and start again."""
        run, account = self.run, self.account
        self._keep()
        waited = run.detect if self.failure.hang else 0.0
        account.failures += 1
        account.lost += self.now - self.kept_at
        account.detecting += waited
        account.restarting += run.restart
        self.now += waited + run.restart
        self.step, self.kept_at, self.writing = self.kept, self.now, None
        self._next_failure()

    def _next_failure(self) -> None:
        self.failure = next(self.failures, Failure(math.inf))
        self.fails_at = self.now + self.failure.after


def random_failures(seed: int, mean: float, hang_share: float) -> Iterator[Failure]:
    """Yield failures that come independently of each other, ``mean`` seconds apart on average; endless."""
    draws = random.Random(seed)
    while True:
        yield Failure(draws.expovariate(1 / mean), draws.random() < hang_share)


def cost_of_one(run: Run, times: int = 101) -> float:
    """Return the seconds that one crash adds, averaged over moments spread evenly over the run.

    ``times`` is a prime, so that the moments fall on all phases of the interval between checkpoints.
    """
    calm = play(run).total
    moments = [(i + 0.5) / times * calm for i in range(times)]
    return sum(play(run, [Failure(at)]).total - calm for at in moments) / times


def run_of(cfg: TrainConfig, counts: Counts, layout: Layout, gpu: Gpu, assumed: Assumptions, step: float) -> Run:
    """Return the events of a run, from counted bytes and FLOPs, with steps of ``step`` seconds."""
    storage = assumed.storage(layout.nodes)
    read = (counts.states + layout.nodes * counts.frozen) / storage
    return Run(
        steps=cfg.steps,
        step=step,
        checkpoint_every=cfg.checkpoint_every,
        copy=counts.states / layout.shards / (1e9 * assumed.host_gb),
        write=counts.states / storage,
        pauses=_pauses(cfg, counts, layout, assumed.utilisation * gpu.peak),
        detect=detection(cfg, layout.gpus),
        restart=assumed.restart_s + read,
    )


def _pauses(cfg: TrainConfig, counts: Counts, layout: Layout, rate: float) -> tuple[tuple[int, float], ...]:
    found, forward = [], counts.text_flops + counts.image_flops
    if cfg.preview_every:  # every process samples all images
        found.append((cfg.preview_every, cfg.preview.batch * cfg.preview.steps * GUIDED * forward / rate))
    if cfg.validation.every:
        share = math.ceil(cfg.validation.samples / layout.gpus)
        each = counts.encoder_flops + counts.codec_flops + len(cfg.validation.times) * forward
        found.append((cfg.validation.every, share * each / rate))
    return tuple(found)


def detection(cfg: TrainConfig, gpus: int) -> float:
    """Return the mean seconds from a hang to the end of all processes; without a watchdog the longest possible wait.

    Notes are written and read once per poll, so progress is seen half a poll late and its absence another half poll
    late; then the alarm gives all processes two polls to write their stacks. Hangs in the slow phases, such as the
    first step, take up to ``watchdog.grace`` and are left out.
    """
    timeout = cfg.watchdog.seconds(gpus)
    if not timeout:
        return PATIENCE.total_seconds()
    return timeout + 3 * min(LONGEST_POLL, timeout / POLLS)
