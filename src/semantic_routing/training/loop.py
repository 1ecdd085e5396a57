"""The training loop: on one process or on those that torchrun starts, exactly resumable, never half-written.

    semroute train toy --out runs/x
    torchrun --nproc-per-node 8 -m semantic_routing train paper --out runs/x

All processes run this file; what a run writes but checkpoints is written by the first of them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from semantic_routing.checkpoint.load import checkpoints, find_checkpoint, read_state
from semantic_routing.common.config import to_dict
from semantic_routing.common.device import keep_freed_memory
from semantic_routing.common.distributed import World, open_world
from semantic_routing.common.errors import Interrupted
from semantic_routing.common.files import check_writable, write_text
from semantic_routing.common.images.save import save_png
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.common.manifest import manifest
from semantic_routing.common.stopping import stop_signals
from semantic_routing.common.troubles import Troubles, forgiving_stderr, say
from semantic_routing.data.damage import FILE as DAMAGED
from semantic_routing.data.damage import DamageLog
from semantic_routing.data.dataset import Dataset, open_data
from semantic_routing.data.loader import Batch, Loader
from semantic_routing.data.sources.discover import SHAPES
from semantic_routing.model.codec import Codec, NotFiniteError
from semantic_routing.sampling.located import FOLDER, KEY, here
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import tiny_sizes
from semantic_routing.toy.stories import story
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.metrics import Meter, flops_per_image, peak_flops, peak_memory, routing_entropy
from semantic_routing.training.origins import changes, data_origins
from semantic_routing.training.parallelize import arrange
from semantic_routing.training.prefetch import one_ahead
from semantic_routing.training.run_folder import (
    check_new,
    going_on,
    keep_encoder,
    latest,
    located_run,
    note_steps,
    run_of,
)
from semantic_routing.training.tiny_lm import tiny_lm
from semantic_routing.training.tracking import Row, Tracker
from semantic_routing.training.trainer import Inputs, Trainer
from semantic_routing.training.validation import HeldOut, held_out, validate
from semantic_routing.training.watchdog import Watchdog, job_store

OnStep = Callable[[int], None]
CORPUS_SEED = 1
"""Seed of the stories that the tiny language model learns from; one model then serves every run."""


def start(cfg: TrainConfig, out: Path, on_step: OnStep | None = None) -> Path:
    """Begin the run ``cfg`` in the folder ``out`` and train it to its end; returns the last checkpoint.

    ``on_step`` is called after each step with the number of finished steps. Raises ValueError for what the user
    can mend, before anything is written; Interrupted after SIGINT or SIGTERM, TrainingFailed where loss and weights
    stay without finite values. On several processes all end alike, and the first raises.
    """
    with open_world() as world, _claimed(world, out):
        world.on_first(partial(check_new, out))
        world = arrange(world, cfg.parallel, cfg.device)
        data = world.everywhere(lambda: open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed))
        text = cfg.text
        sizes = tiny_sizes(text.name_or_path)
        if sizes is not None:
            made = world.first_then_rest(lambda: tiny_lm(training_corpus(data), **sizes))
            text = replace(text, name_or_path=str(made))

        def make() -> Trainer:
            shape = text_shape(text)
            model = replace(cfg.model, text_width=shape.width, text_layers=len(shape.layers))
            return Trainer(replace(cfg, model=model), out, world, text)

        def write() -> None:
            if sizes is not None:
                keep_encoder(Path(text.name_or_path), out)
            write_text(out / "config.json", json.dumps(to_dict(trainer.cfg), indent=2) + "\n")

        trainer = world.everywhere(make)
        trainer.record[KEY] |= {"data": world.on_first(lambda: data_origins(data)), FOLDER: here()}
        world.on_first(write)
        return _run(trainer, data, on_step)


@dataclass(frozen=True, kw_only=True)
class ResumeArguments:
    """Go on with a run."""

    steps: int | None = None
    """Train on to this step, instead of to the one where the run was to end."""
    accept_changes: bool = False
    """Go on although data, captions, text encoder or VAE are no longer those that the run was begun on."""


def resume(out: Path, on_step: OnStep | None = None, *, steps: int | None = None, accept_changes: bool = False) -> Path:
    """Go on with the run in the folder ``out`` from its latest whole checkpoint, as ``start`` would have.

    On as many processes as before the run ends bitwise as if it had never stopped. It ends at ``steps``, if given, else
    where it was to end. ValueError where its data or models are not those that it was begun on, but with
    ``accept_changes``.
    """
    with open_world() as world:
        run = world.on_first(partial(run_of, out))
        with _claimed(world, run):
            folder = world.on_first(partial(latest, out))
            then = world.everywhere(lambda: read_state(folder).get(KEY, {}))
            asked, words = world.on_first(partial(going_on, run, folder, steps))
            cfg = located_run(asked, then.get(FOLDER))
            if cfg != asked:
                words.append(f"the run began in another folder, {then[FOLDER]}: relative paths are taken from there")
            world = arrange(world, cfg.parallel, cfg.device)
            data = world.everywhere(lambda: open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed))
            trainer = world.everywhere(lambda: Trainer(cfg, run, world))
            world.everywhere(lambda: trainer.load(folder))
            now = trainer.record[KEY] | {"data": world.on_first(lambda: data_origins(data))}
            words += world.on_first(lambda: _accepted(run, changes(then, now), accept_changes))
            for line in words if world.first else ():
                say(line)
            trainer.record = {"config": to_dict(asked), KEY: now | {FOLDER: then.get(FOLDER) or here()}}
            world.on_first(partial(note_steps, run, asked))
            return _run(trainer, data, on_step)


@contextmanager
def _claimed(world: World, out: Path) -> Iterator[None]:
    """Keep other jobs out of the run's folder; the first process does so for all."""
    with ExitStack() as held:

        def claim() -> None:
            check_writable(out)
            held.enter_context(claimed(out / LOCK, out))

        world.on_first(claim)
        yield


def _accepted(run: Path, found: list[str], accepted: bool) -> list[str]:
    """What is to be told where data or models have changed; ValueError where the user does not know of it."""
    if found and not accepted:
        raise ValueError(
            f"this is not what {run} was begun on: {'; '.join(found)}. Put back what was, or go on with it as it is: "
            f"semroute train --resume {shlex.quote(str(run))} --accept-changes"
        )
    return [f"going on with what has changed: {one}" for one in found]


def training_corpus(data: Dataset, size: int = 20_000) -> list[str]:
    """What the tiny language model reads: stories of the toy world, and the user's own captions."""
    toy = [story(CORPUS_SEED, index) for index in range(size)]
    return toy if data.cfg.paths == (SHAPES,) else toy + data.captions(size)


def batches(data: Dataset, cfg: TrainConfig, world: World, codec: Codec, first: int) -> Generator[Batch, None, None]:
    """This process's equal part of every step's batch, from step ``first`` on: the parts lie in order of rank."""
    # A CPU that trains has no core to spare: a thread that draws beside it would stall every parallel region.
    ahead = cfg.data.ahead if cfg.data.workers or world.device.type != "cpu" else 0
    loader = Loader(
        data, batch=cfg.batch, rank=world.rank, world=world.count, workers=cfg.data.workers, ahead=ahead,
        noise_shape=codec.latent_shape(cfg.image_size), posterior=codec.has_posterior,
    )  # fmt: skip
    return loader.batches(first)


def _held_out(cfg: TrainConfig) -> HeldOut | None:
    """The pictures to validate on, if any."""
    return held_out(cfg.validation, cfg.data, cfg.image_size) if cfg.validation.every else None


def _run(trainer: Trainer, data: Dataset, on_step: OnStep | None) -> Path:
    """Train from where the trainer is to the last step; returns the last checkpoint."""
    keep_freed_memory()
    cfg, out, world, first = trainer.cfg, trainer.out, trainer.world, trainer.step
    facts = manifest(config=to_dict(cfg), seeds={"run": cfg.seed}, from_step=first, processes=world.count)
    world.on_first(lambda: write_text(out / "manifest.json", json.dumps(facts, indent=2) + "\n"))
    pictures = world.everywhere(lambda: _held_out(cfg))
    tracker = world.everywhere(lambda: Tracker(out, first, cfg.track, to_dict(cfg)) if world.first else None)
    with (
        tracker or nullcontext(),
        forgiving_stderr(),
        stop_signals() as stop,
        Watchdog(cfg.watchdog, job_store(), world.rank, world.count) as dog,
        closing(trainer.saver),
        closing(batches(data, cfg, world, trainer.bundle.codec, first)) as drawn,
        tqdm(total=cfg.steps, initial=first, desc=f"Training {cfg.model.arm}", disable=not world.first) as bar,
    ):
        trainer.beat = lambda phase: dog.beat(trainer.step, phase)
        loop = _Loop(trainer, data, pictures, tracker)
        with closing(one_ahead(trainer.prepare, loop.timed(drawn), world.device)) as inputs:
            while trainer.step < cfg.steps:
                row = loop.step(next(inputs))
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                bar.update()
                loop.show(row)
                if on_step is not None:
                    on_step(trainer.step)
                loop.keep(stop)
        trainer.beat("saving")
        trainer.finish_writing()
    return world.on_first(lambda: find_checkpoint(out))


class _Loop:
    """What is done around a step: waiting for it to begin, showing how it went, keeping what came of it."""

    def __init__(self, trainer: Trainer, data: Dataset, pictures: HeldOut | None, tracker: Tracker | None) -> None:
        self.trainer, self.cfg, self.world = trainer, trainer.cfg, trainer.world
        self.data, self.pictures, self.tracker = data, pictures, tracker
        self.meter = Meter(self.world.count, peak_flops(self.world.device))
        listed = trainer.out / DAMAGED if self.world.first else None
        self.damage = DamageLog(listed, most=self.cfg.data.max_damaged, counts=trainer.damaged)
        self.troubles = Troubles()
        self.drawn: deque[Batch] = deque()
        """Batches that are drawn and not trained yet."""

    def timed(self, drawn: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, and what waiting for them takes."""
        waiting = iter(drawn)
        while True:
            self.trainer.beat("loading data")
            with self.meter.timed("data"):
                batch = next(waiting)
            self.drawn.append(batch)
            yield batch

    def step(self, parts: Sequence[Inputs]) -> Row:
        """Train one step."""
        row = self.trainer.advance(parts)
        batch = self.drawn.popleft()
        self.damage.add(len(batch.captions), batch.damaged)
        flops = 0 if self.meter.peak is None else sum(_flops(self.cfg, part) for part in parts)
        self.meter.step(self.cfg.batch, self.world.count * flops)
        return row

    def show(self, row: Row) -> None:
        """Write the step's metrics, validate, draw samples, each when it is time."""
        cfg, trainer, found = self.cfg, self.trainer, {}
        if self.pictures is not None and self._now(cfg.validation.every):
            trainer.beat("validating")
            with self.meter.timed("validation"), trainer.averaged() as bundle:
                found = validate(bundle, self.pictures, cfg.validation, self.world, self.troubles)
        if found or self._now(cfg.log_every):
            trainer.beat("logging")
            self.count_damage()
            row = row | routing_entropy(trainer.bundle.model) | found | self.meter.row()
            row |= {"damaged": self.damage.damaged}
            if self.tracker is not None:
                self.tracker.write(row | {"memory": peak_memory(self.world.device)})
        if cfg.preview_every and trainer.step % cfg.preview_every == 0:
            trainer.beat("sampling")
            with self.meter.timed("sampling"):
                picture = self.preview()
            if self.tracker is not None and picture is not None:
                path = trainer.out / "samples" / f"step-{trainer.step:07d}.png"
                with self.troubles.survived(path.parent, ValueError):
                    save_png(path, picture, scale=max(1, 96 // cfg.image_size))
                self.tracker.picture(trainer.step, "samples", picture)

    def preview(self) -> UInt8[np.ndarray, "H W 3"] | None:
        """Draw the grid of samples; None where one is not finite, which is told and ends nothing."""
        try:
            return self.trainer.preview(self.data.captions(self.cfg.preview.batch))
        except NotFiniteError as error:
            if self.world.first:
                tqdm.write(f"semroute: no samples of step {self.trainer.step}: {error}", file=sys.stderr)
            return None

    def keep(self, stop: Sequence[int]) -> None:
        """Save when it is time, or where any process got a signal: then all end as Interrupted."""
        trainer, last = self.trainer, self.trainer.step == self.cfg.steps
        number, failed = self.world.max(stop[0] if stop else 0, int(trainer.saver.failed))
        if failed:
            trainer.finish_writing()
        # While no finite loss is seen, the checkpoints before are worth more than another.
        if last or number or (trainer.step % self.cfg.checkpoint_every == 0 and not trainer.bad):
            trainer.beat("saving")
            self.count_damage()
            with self.meter.timed("saving"):
                trainer.save()
        if number and not last:
            trainer.finish_writing()
            self.world.fail(
                Interrupted(
                    f"stopped at step {trainer.step} of {self.cfg.steps} and wrote {checkpoints(trainer.out)[-1]}; "
                    f"go on with: semroute train --resume {shlex.quote(str(trainer.out))}",
                    number,
                )
            )

    def count_damage(self) -> None:
        """Count, over all processes, the records that were skipped; too large a share ends the run."""
        tallies = self.world.all_gather(self.damage.take())
        self.world.everywhere(lambda: self.damage.merge(tallies))
        self.trainer.damaged = self.damage.counts()

    def _now(self, every: int) -> bool:
        return self.trainer.step == self.cfg.steps or self.trainer.step % every == 0


def _flops(cfg: TrainConfig, inputs: Inputs) -> int:
    """Products of training on a microbatch."""
    images, _, height, width = inputs.latents.shape
    return images * flops_per_image(cfg.model, height, width, inputs.features.mask.shape[1])
