"""The training loop, on one process or on several started by torchrun; a run can be resumed exactly.

    semroute train toy --out runs/x
    torchrun --nproc-per-node 8 -m semantic_routing train paper --out runs/x

Read it from top to bottom: start or resume a run, open what the loop needs, then for each step load a batch, train,
validate, log, sample, write a checkpoint, and stop after a signal. All processes run this file; the first one writes
everything except checkpoints, which all of them write.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from semantic_routing.checkpoint.load import checkpoints, find_checkpoint, read_state
from semantic_routing.common.config import to_dict
from semantic_routing.common.device import keep_freed_memory
from semantic_routing.common.distributed import World, open_world
from semantic_routing.common.errors import Interrupted
from semantic_routing.common.files import write_text
from semantic_routing.common.images.save import save_png
from semantic_routing.common.manifest import manifest
from semantic_routing.common.stopping import stop_signals
from semantic_routing.common.troubles import Troubles, forgiving_stderr, say
from semantic_routing.data.batch import Batch
from semantic_routing.data.dataset import Dataset, open_data
from semantic_routing.data.loader import Loader
from semantic_routing.model.codec import Codec, NotFiniteError
from semantic_routing.sampling.located import FOLDER, KEY, here
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TextEncoderConfig, tiny_sizes
from semantic_routing.training.config import RunConfig, TrainConfig
from semantic_routing.training.latents import kept_latents
from semantic_routing.training.metrics import Meter, peak_flops, peak_memory
from semantic_routing.training.origins import accept, changes, data_origins
from semantic_routing.training.parallelize import arrange
from semantic_routing.training.prefetch import one_ahead
from semantic_routing.training.run_folder import (
    CONFIG,
    MANIFEST,
    TRAIN,
    check_new,
    claimed_run,
    going_on,
    keep_encoder,
    latest,
    located_run,
    note_steps,
    run_of,
)
from semantic_routing.training.steps import Prepared, Steps
from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
from semantic_routing.training.tracking import Row, Tracker
from semantic_routing.training.trainer import Trainer
from semantic_routing.training.validation import HeldOut
from semantic_routing.training.watchdog import Phase, Watchdog, job_store

OnStep = Callable[[int], None]


def start(cfg: TrainConfig, out: Path, on_step: OnStep | None = None) -> Path:
    """Train ``cfg`` in the new folder ``out`` up to its last step, and return the folder of the last checkpoint.

        train(replace(recipes.toy("depth"), steps=2000), Path("runs/depth"))

    ``on_step`` is called after each step with the number of finished steps. Raises ValueError for mistakes of the user,
    before anything is written; Interrupted after a signal such as SIGTERM; TrainingFailed if the loss or the weights
    remain NaN or infinite. All processes of a job end together, and the first one raises.
    """
    with open_world() as world, claimed_run(world, out):
        world.on_first(partial(check_new, out))
        world = arrange(world, cfg.parallel, cfg.device)
        data = world.everywhere(partial(_open_data, cfg))
        text, sizes = cfg.text, tiny_sizes(cfg.text.name_or_path)
        if sizes is not None:
            made = world.first_then_rest(lambda: tiny_lm(training_corpus(data), **sizes))
            text = replace(text, name_or_path=str(made))
        trainer = world.everywhere(lambda: Trainer(_with_text_sizes(cfg, text), out, world, text))
        trainer.record[KEY] |= {"data": world.on_first(lambda: data_origins(data)), FOLDER: here()}
        if sizes is not None:
            world.on_first(partial(keep_encoder, Path(text.name_or_path), out))
        world.on_first(partial(write_json, out / CONFIG, to_dict(trainer.cfg)))
        return train(trainer, data, on_step)


@dataclass(frozen=True, kw_only=True)
class ResumeArguments:
    """Resume a run."""

    steps: int | None = None
    """Train to this step instead of the run's last step, also after the run's time is over."""
    accept_changes: bool = False
    """Resume although data, captions, text encoder or VAE have changed since the run started."""


def resume(out: Path, on_step: OnStep | None = None, *, steps: int | None = None, accept_changes: bool = False) -> Path:
    """Resume the run in the folder ``out`` from its latest complete checkpoint, and return its last checkpoint.

    With the same number of processes, the result is bitwise that of a run that never stopped. ``steps`` replaces the
    run's last step. Raises ValueError if data or models have changed, unless ``accept_changes``; otherwise the same
    errors as ``train``.
    """
    with open_world() as world:
        run = world.on_first(partial(run_of, out))
        with claimed_run(world, run):
            folder = world.on_first(partial(latest, out))
            then = world.everywhere(lambda: read_state(folder).get(KEY, {}))
            asked, words = world.on_first(partial(going_on, run, folder, steps, TRAIN))
            cfg = located_run(asked, then.get(FOLDER))
            if cfg != asked:
                words.append(f"the run was started in another folder, {then[FOLDER]}: relative paths start there")
            world = arrange(world, cfg.parallel, cfg.device)
            data = world.everywhere(partial(_open_data, cfg))
            trainer = world.everywhere(lambda: Trainer(cfg, run, world))
            world.everywhere(lambda: trainer.load(folder))
            now = trainer.record[KEY] | {"data": world.on_first(lambda: data_origins(data))}
            words += world.on_first(lambda: accept(run, changes(then, now), accept_changes, TRAIN.again))
            for line in words if world.first else ():
                say(line)
            trainer.record = {"config": to_dict(asked), KEY: now | {FOLDER: then.get(FOLDER) or here()}}
            world.on_first(partial(note_steps, run, asked))
            return train(trainer, data, on_step)


def train(trainer: Steps, data: Dataset, on_step: OnStep | None = None) -> Path:
    """Train from the trainer's step to the end of the run and return the last checkpoint."""
    keep_freed_memory()
    cfg, out, world, first = trainer.cfg, trainer.out, trainer.world, trainer.step
    facts = manifest(config=to_dict(cfg), seeds={"run": cfg.seed}, from_step=first, processes=world.count)
    world.on_first(lambda: write_json(out / MANIFEST, facts))
    pictures = world.everywhere(trainer.held_out) if cfg.validation.every else None
    tracker = world.everywhere(lambda: Tracker(out, first, cfg.track, to_dict(cfg)) if world.first else None)
    with (
        tracker or nullcontext(),
        forgiving_stderr(),
        stop_signals() as stop,
        Watchdog(cfg.watchdog, job_store(), world.rank, world.count) as dog,
        closing(trainer.saver),
        closing(batches(data, cfg, world, trainer.codec, first)) as loaded,
        tqdm(total=cfg.last_step, initial=first, desc=trainer.title, disable=not world.first) as bar,
    ):
        meter, began = Meter(world.count, peak_flops(world.device)), time.monotonic() - trainer.seconds
        loop = Loop(trainer, data, pictures, tracker, dog, meter, began)
        with closing(one_ahead(trainer.prepare, loop.timed(loaded), world.device)) as inputs:
            while not trainer.done:
                row = loop.advance(next(inputs))
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                bar.update()
                loop.log(row, loop.validate())
                loop.preview()
                if on_step is not None:
                    on_step(trainer.step)
                loop.checkpoint(stop)
        loop.beat("saving")
        trainer.finish_writing()
    return world.on_first(lambda: find_checkpoint(out))


@dataclass(frozen=True)
class Loop:
    """The work around each training step; the methods are in the order in which ``train`` calls them."""

    trainer: Steps
    data: Dataset
    pictures: HeldOut | None
    """Images to validate on, if any."""
    tracker: Tracker | None
    """None on all processes but the first."""
    dog: Watchdog
    meter: Meter
    began: float
    """Time of ``time.monotonic`` at which the training would have begun if it had never stopped."""
    troubles: Troubles = field(default_factory=Troubles)

    def timed(self, loaded: Iterator[Batch[Tensor]]) -> Iterator[Batch[Tensor]]:
        """Yield the batches and measure the time spent waiting for them."""
        while True:
            with self._during("loading data", "data"):
                batch = next(loaded)
            yield batch

    def advance(self, inputs: Sequence[Prepared]) -> Row:
        """Train one step and return its metrics."""
        cfg = self.trainer.cfg
        row = self.trainer.advance(inputs, self.beat)
        if self.trainer.limit:
            self.trainer.seconds = self._seconds()
        flops = 0 if self.meter.peak is None else sum(map(self.trainer.flops, inputs))
        self.meter.step(cfg.batch, self.trainer.world.count * flops)
        return row

    def validate(self) -> dict[str, float]:
        """Return the validation loss of the averaged weights if it is due, else nothing."""
        cfg, trainer = self.trainer.cfg.validation, self.trainer
        if self.pictures is None or not self._due(cfg.every):
            return {}
        with self._during("validating", "validation"):
            return trainer.validate(self.pictures, self.troubles)

    def log(self, row: Row, validation: dict[str, float]) -> None:
        """Write the step's metrics if that is due or there was a validation."""
        trainer = self.trainer
        if not (validation or self._due(trainer.cfg.log_every)):
            return
        self.beat("logging")
        trainer.count_damage()
        row = row | trainer.facts() | validation | self.meter.row()
        row |= {"damaged": trainer.damage.damaged}
        if self.tracker is not None:
            self.tracker.write(row | {"memory": peak_memory(trainer.world.device)})

    def preview(self) -> None:
        """Sample a grid of images if that is due; images that are not finite are reported and end nothing."""
        trainer, cfg = self.trainer, self.trainer.cfg
        if not cfg.preview_every or trainer.step % cfg.preview_every:
            return
        try:
            with self._during("sampling", "sampling"):
                picture = trainer.preview(self.data)
        except NotFiniteError as error:
            if trainer.world.first:
                say(f"no samples of step {trainer.step}: {error}")
            return
        if self.tracker is not None:
            path = trainer.out / "samples" / f"step-{trainer.step:07d}.png"
            with self.troubles.survived(path.parent, ValueError):
                save_png(path, picture, scale=max(1, 96 // cfg.image_size))
            self.tracker.picture(trainer.step, "samples", picture)

    def checkpoint(self, stop: Sequence[int]) -> None:
        """Write a checkpoint if it is due; after a signal to any process write one and end all as Interrupted."""
        trainer, cfg, world = self.trainer, self.trainer.cfg, self.trainer.world
        number, failed = world.max(stop[0] if stop else 0, int(trainer.saver.failed))
        if failed:
            trainer.finish_writing()
        last = trainer.done
        # While no finite loss is seen, earlier checkpoints are worth more than another one.
        if last or number or (trainer.step % cfg.checkpoint_every == 0 and not trainer.bad):
            with self._during("saving", "saving"):
                trainer.save()
        if number and not last:
            trainer.finish_writing()
            message = f"stopped at step {trainer.step} of {cfg.last_step} and wrote {checkpoints(trainer.out)[-1]}; "
            message += f"resume with: {trainer.again} {shlex.quote(str(trainer.out))}"
            world.fail(Interrupted(message, number))

    def beat(self, phase: Phase) -> None:
        """Report the current phase to the watchdog."""
        self.dog.beat(self.trainer.step, phase)

    @contextmanager
    def _during(self, phase: Phase, activity: str) -> Iterator[None]:
        """Report ``phase`` to the watchdog, and measure the time as ``activity``."""
        self.beat(phase)
        with self.meter.timed(activity):
            yield

    def _due(self, every: int) -> bool:
        return self.trainer.done or self.trainer.step % every == 0

    def _seconds(self) -> float:
        """Return the seconds trained so far, on all processes those of the slowest."""
        return self.trainer.world.max(round(1000 * (time.monotonic() - self.began)))[0] / 1000


def batches(
    data: Dataset, cfg: RunConfig, world: World, codec: Codec, first: int
) -> Generator[Batch[Tensor], None, None]:
    """Yield this rank's equal share of each step's batch from step ``first`` on; shares are in order of rank."""
    # A CPU that trains has no core to spare: a thread that draws beside it would stall every parallel region.
    ahead = cfg.data.ahead if cfg.data.workers or world.device.type != "cpu" else 0
    loader = Loader(
        data, batch=cfg.batch, rank=world.rank, world=world.count, workers=cfg.data.workers, ahead=ahead,
        noise_shape=codec.latent_shape(cfg.image_size), posterior=codec.has_posterior,
    )  # fmt: skip
    return loader.batches(first)


def _open_data(cfg: TrainConfig) -> Dataset:
    return open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed, latents=kept_latents(cfg.codec))


def _with_text_sizes(cfg: TrainConfig, text: TextEncoderConfig) -> TrainConfig:
    """Set the network's text width and layers to those of the text encoder."""
    shape = text_shape(text)
    return replace(cfg, model=replace(cfg.model, text_width=shape.width, text_layers=len(shape.layers)))


def write_json(path: Path, value: Any) -> None:
    """Write settings as a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")
