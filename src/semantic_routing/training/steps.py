"""Steps: the state of a run (weights, moving average, optimisers, counts) and one training step, for any loss.

The data of a step depends only on the configuration and the step number: order, noise, times and prompt dropout are
functions of (seed, sample, epoch). A run that stops at a checkpoint and resumes therefore ends with bitwise the same
weights at the same world size, and with the same weights up to rounding at another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.optim import Optimizer

from semantic_routing.checkpoint.load import checkpoints, load_training_state, read_state
from semantic_routing.checkpoint.save import Saver
from semantic_routing.common.device import pick_device
from semantic_routing.common.distributed import World
from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.manifest import versions
from semantic_routing.common.troubles import Troubles
from semantic_routing.data.batch import Batch
from semantic_routing.data.damage import FILE as DAMAGED
from semantic_routing.data.damage import DamageLog, Skipped
from semantic_routing.data.dataset import Dataset
from semantic_routing.model.codec import Codec
from semantic_routing.training.config import RunConfig
from semantic_routing.training.optim import make_optimizers, set_rates
from semantic_routing.training.parallelize import local, reshard, synchronise, whole
from semantic_routing.training.tracking import Row
from semantic_routing.training.validation import HeldOut
from semantic_routing.training.watchdog import Phase


@runtime_checkable
class Prepared(Protocol):
    """A microbatch after the frozen models have processed it."""

    @property
    def skipped(self) -> list[tuple[Skipped, ...]]:
        """Records that were skipped for each row."""


class Steps(ABC):
    """The state of a run on one process: model, moving average, optimisers, finished steps, skipped records.

    Subclasses, one for each kind of run, define the model, the data and the loss.
    """

    title: str
    """Name of the progress bar."""
    again: str = "semroute train --resume"
    """Command that resumes such a run."""
    model: nn.Module
    """The trained model, which checkpoints contain."""
    codec: Codec
    optimizers: list[Optimizer]
    ema: dict[str, Tensor]
    """Moving average of each parameter."""
    saver: Saver
    record: dict[str, Any]
    """Facts of the run that every checkpoint records."""
    limit: float = 0
    """Seconds after which the training ends before its last step; 0 for no limit."""
    seconds: float = 0
    """Seconds trained so far, resumed runs included; the same on all processes, and 0 without a limit."""

    def __init__(self, cfg: RunConfig, out: Path, world: World | None = None) -> None:
        """Begin at step 0 in the folder ``out``; raise ValueError if the batch does not divide."""
        self.cfg, self.out = cfg, out
        self.world = world or World(device=pick_device(cfg.device))
        self.step = self.skipped = self.bad = 0
        self.damage = DamageLog(out / DAMAGED if self.world.first else None, most=cfg.data.max_damaged)
        cfg.share(self.world.count)

    @property
    def progress(self) -> float:
        """The part of the run that is done, by steps or, if that is more, by time."""
        return max(self.step / self.cfg.steps, self.seconds / self.limit if self.limit else 0)

    @property
    def done(self) -> bool:
        """Whether the run has reached its last step or its time limit."""
        return self.step >= self.cfg.last_step or (bool(self.limit) and self.seconds >= self.limit)

    def _train(self, model: nn.Module) -> None:
        """Make optimisers, average and writer for what is trained."""
        self.model, cfg = model, self.cfg
        self.optimizers = make_optimizers(model, cfg.optim)
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.saver = Saver(self.out, keep=cfg.keep, keep_every=cfg.keep_every, group=self.world.threads)

    @abstractmethod
    def prepare(self, batch: Batch[Tensor]) -> Sequence[Prepared]:
        """Run the frozen models on this process's share of a batch, in microbatches."""

    @abstractmethod
    def loss(self, part: Any) -> Float[Tensor, ""]:
        """Return the loss of a microbatch."""

    @abstractmethod
    def preview(self, data: Dataset) -> UInt8[np.ndarray, "H W 3"]:
        """Sample a grid of images of the data's captions with the averaged weights, on every process."""

    @abstractmethod
    def held_out(self) -> HeldOut:
        """Open the held-out images; raise ValueError if there are none."""

    @abstractmethod
    def validate(self, pictures: HeldOut, troubles: Troubles) -> dict[str, float]:
        """Return the validation loss of the averaged weights; a collective call."""

    def facts(self) -> dict[str, float]:
        """Return additional metrics of the weights; a collective call."""
        return {}

    def flops(self, part: Any) -> int:
        """Return the training FLOPs of a microbatch, or 0 if they are not counted."""
        return 0

    def _set_rates(self) -> float:
        """Set the learning rates of the step; return their share of the peak."""
        return set_rates(self.optimizers, self.cfg.optim, self.step, self.progress)

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint; raises ValueError if it is damaged or of another model."""
        state = read_state(checkpoint)
        self.ema = load_training_state(checkpoint, self.model, self.optimizers, self.world.threads)
        self.damage.restore(state.get("damaged", {}))
        self.step, self.skipped, self.bad = (state.get(name, 0) for name in ("step", "skipped_steps", "bad_steps"))
        self.seconds = state.get("seconds", 0)

    def advance(self, inputs: Sequence[Prepared], beat: Callable[[Phase], None] = lambda phase: None) -> Row:
        """Take one optimiser step over the microbatches of all processes; return its metrics, which cover all of them.

        ``beat`` is called with each phase of the step. If the loss or the gradient is NaN or infinite, only the step
        number and the count of skipped steps change; too many such steps in a row raise TrainingFailed.
        """
        rate = self._set_rates()
        mean = torch.zeros((), device=self.world.device)
        for left, part in zip(reversed(range(len(inputs))), inputs, strict=True):
            beat("forward")
            synchronise(self.model, left == 0)
            loss = self.loss(part) / len(inputs)
            beat("backward")
            loss.backward()
            mean += loss.detach()
            self.damage.add(part.skipped)
        beat("updating")
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip))
        row: Row = {
            "step": self.step + 1,
            "loss": self.world.mean(mean).item(),
            "grad_norm": norm.item(),
            "lr": rate * self.cfg.optim.lr,
        }
        good = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        self._count(good, f"the loss is {row['loss']} and the gradient's norm {row['grad_norm']}")
        for optimizer in self.optimizers:
            if good:
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.step % self.cfg.ema_every == 0:
            self._average()
        return row | {"skipped": self.skipped}

    def _count(self, good: bool, what: str) -> None:
        """Count skipped steps; end the run after too many in a row."""
        self.skipped += not good
        self.bad = 0 if good else self.bad + 1
        if self.bad >= self.cfg.max_bad_steps:
            self._fail(what + (f", for {self.bad} steps in a row" if self.bad > 1 else ""), self.step + 1)

    def _fail(self, what: str, step: int) -> NoReturn:
        self.saver.close()
        saved = checkpoints(self.out)
        self.world.fail(
            TrainingFailed(
                f"training stopped at step {step}: {what}. Lower the learning rate or try --precision fp32; "
                + (f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been written yet")
            )
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average of this process's shards towards the weights; the decay rises over the first updates."""
        updates = self.step // self.cfg.ema_every
        decay = min(self.cfg.ema_decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_([local(x) for x in self.ema.values()], self._shards(), 1 - decay)

    def _shards(self) -> list[Tensor]:
        """Return this process's shards of the weights."""
        return [local(p.detach()) for p in self.model.parameters()]

    def count_damage(self) -> None:
        """Count the skipped records of all processes; end the run if their share is too large."""
        tallies = self.world.all_gather(self.damage.take())
        self.world.everywhere(lambda: self.damage.merge(tallies))

    def save(self) -> None:
        """Start writing a checkpoint, after the one before is written; fail if the weights are not finite."""
        self.count_damage()
        finite = all(bool(p.isfinite().all()) for p in self._shards())
        if self.world.max(int(not finite))[0]:
            self._fail("weights are no longer finite", self.step)
        state: dict[str, Any] = {
            "position": self.step * self.cfg.batch,
            "skipped_steps": self.skipped,
            "bad_steps": self.bad,
            "seconds": self.seconds,
            "damaged": self.damage.counts(),
            "processes": self.world.count,
            "versions": versions(),
        } | self.record
        self.finish_writing()
        self.saver.save(self.step, self.model, self.ema, self.optimizers, state)

    def finish_writing(self) -> None:
        """Wait until the last checkpoint is on disk; if that failed, end all processes with the reason."""
        try:
            self.saver.wait()
        except ValueError as error:
            self.world.fail(error)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model within the context."""
        own = self._shards()
        trained = [x.clone() for x in own]
        torch._foreach_copy_(own, [local(x) for x in self.ema.values()])
        try:
            yield
        finally:
            reshard(self.model)
            torch._foreach_copy_(own, trained)
