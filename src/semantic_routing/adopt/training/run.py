"""Runs of ``semroute adopt train``: started, resumed exactly, and their results.

from semantic_routing.adopt.training.config import AdoptConfig
from semantic_routing.adopt.training.run import start

folder = start(AdoptConfig(pipeline="pipelines/b1", arm="depth", steps=500), Path("routings/b1"))
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from semantic_routing.adopt.training.config import AdoptConfig
from semantic_routing.adopt.training.keep_texts import MEASURED, caption_count
from semantic_routing.adopt.training.make_subject import make_subject
from semantic_routing.adopt.training.open_pipeline import frozen, open_pipe
from semantic_routing.adopt.training.trainer import ADOPT, AdoptTrainer, resolved
from semantic_routing.checkpoint.load import read_state
from semantic_routing.common.config import to_dict
from semantic_routing.common.device import pick_device
from semantic_routing.common.distributed import World
from semantic_routing.common.troubles import say
from semantic_routing.data.dataset import Dataset, open_data
from semantic_routing.sampling.located import FOLDER, KEY, here, located
from semantic_routing.training.loop import OnStep, train, write_json
from semantic_routing.training.origins import accept, changes, data_origins
from semantic_routing.training.run_folder import (
    CONFIG,
    check_new,
    claimed_run,
    going_on,
    latest,
    located_run_data,
    note_steps,
    run_of,
)
from semantic_routing.training.validation import held_out


def start(cfg: AdoptConfig, out: Path, on_step: OnStep | None = None, *, pipe: Any = None) -> Path:
    """Train a pipeline's routing, and a LoRA if ``cfg`` asks for one, in the folder ``out``; return the folder.

    ``pipe`` is the pipeline ``cfg.pipeline`` if it is already loaded; it is frozen and adopted. ``on_step`` is called
    after each step with the number of finished steps. Raises ValueError for mistakes of the user, before anything is
    written; Interrupted after a signal such as SIGTERM; TrainingFailed if the loss remains NaN or infinite.
    """
    world = _alone(cfg)
    with claimed_run(world, out):
        check_new(out, ADOPT)
        trainer, data = _opened(cfg, out, world, pipe)
        trainer.record[KEY] |= {"data": data_origins(data), FOLDER: here()}
        write_json(out / CONFIG, to_dict(trainer.cfg))
        train(trainer, data, on_step)
    return out


def resume(
    out: Path,
    on_step: OnStep | None = None,
    *,
    steps: int | None = None,
    accept_changes: bool = False,
    pipe: Any = None,
) -> Path:
    """Resume the run in the folder ``out`` from its latest complete checkpoint; return the folder.

    The result is bitwise that of a run that never stopped. ``steps`` replaces the last step of a run without a LoRA.
    Raises ValueError if data or models have changed, unless ``accept_changes``.
    """
    run = run_of(out)
    with claimed_run(World(), run):
        folder = latest(out)
        then = read_state(folder).get(KEY, {})
        asked, words = going_on(run, folder, steps, ADOPT)
        if asked.lora.rank and asked.steps != ADOPT.read(folder).steps:
            raise ValueError("--steps is for runs without a LoRA: this run's LoRA begins after its routing's last step")
        cfg = located_run_data(replace(asked, pipeline=located(asked.pipeline, then.get(FOLDER))), then.get(FOLDER))
        trainer, data = _opened(cfg, run, _alone(cfg), pipe)
        trainer.load(folder)
        now = trainer.record[KEY] | {"data": data_origins(data)}
        for line in words + accept(run, changes(then, now), accept_changes, ADOPT.again):
            say(line)
        trainer.record = {"config": to_dict(asked), KEY: now | {FOLDER: then.get(FOLDER) or here()}}
        note_steps(run, asked)
        train(trainer, data, on_step)
    return run


def _opened(cfg: AdoptConfig, out: Path, world: World, pipe: Any) -> tuple[AdoptTrainer, Dataset]:
    """Open a run's pipeline and data, and adopt the pipeline last, so that it is unchanged after an error."""
    pipe = open_pipe(cfg.pipeline, world.device, cfg.precision) if pipe is None else frozen(pipe.to(world.device))
    subject = make_subject(pipe, world.device, cfg.precision, cfg.text)
    cfg = resolved(cfg, subject)
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    if cfg.validation.every:
        held_out(cfg.validation, cfg.data, cfg.image_size)
    trainer = AdoptTrainer(cfg, out, world, subject)
    say(subject.keep(caption_count(data), data.captions(MEASURED)))
    return trainer, data


def _alone(cfg: AdoptConfig) -> World:
    """Return the only process; raise ValueError under torchrun with several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("semroute adopt train runs on one process: start it without torchrun")
    return World(device=pick_device(cfg.device))
