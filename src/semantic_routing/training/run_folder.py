"""A run's own folder: what a new run may write there, and what one that goes on reads there."""

from __future__ import annotations

import filecmp
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from semantic_routing.checkpoint.load import STATE, checkpoints, find_checkpoint, read_state
from semantic_routing.common.config import from_dict, read_config, to_dict
from semantic_routing.common.distributed import World
from semantic_routing.common.files import check_writable, write_text, written_whole
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.data.damage import FILE as DAMAGED
from semantic_routing.sampling.load import TEXT_ENCODER, read_run_config
from semantic_routing.sampling.located import located, located_model
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.optim import set_rates
from semantic_routing.training.tracking import IDENTITY, METRICS

CONFIG, MANIFEST = "config.json", "manifest.json"
WRITTEN = (CONFIG, MANIFEST, METRICS, DAMAGED, IDENTITY)
"""Files of a run that replace what has the same name."""


@contextmanager
def claimed_run(world: World, out: Path) -> Iterator[None]:
    """Lock a run's folder against other jobs while the context lasts; the first process holds the lock for all."""
    with ExitStack() as held:

        def claim() -> None:
            check_writable(out)
            held.enter_context(claimed(out / LOCK, out))

        world.on_first(claim)
        yield


def run_of(path: Path) -> Path:
    """The folder of the run that a path means, itself or one of its checkpoints; ValueError where it has none."""
    run = path.parent.parent if (path / STATE).is_file() else path
    if not checkpoints(run):
        find_checkpoint(path)  # says what is wrong
    return run


def latest(path: Path) -> Path:
    """The checkpoint to go on from."""
    folder = find_checkpoint(path)
    if folder == path and folder != find_checkpoint(folder.parent.parent):
        raise ValueError(f"{folder} is not its run's latest checkpoint; move later ones away to go on from there")
    return folder


def check_new(out: Path) -> None:
    """ValueError where a folder holds a run, or files of other origin that a run would replace."""
    if checkpoints(out):
        raise ValueError(
            f"{out} already holds a run: go on with `semroute train --resume {out}` or choose another --out"
        )
    check_writable(out)
    there = [out / name for name in WRITTEN if (out / name).exists()]
    if there and not _begun(out):
        raise ValueError(f"{there[0]} is there already, and of no run: choose another --out, or move it away")


def _begun(out: Path) -> bool:
    """Whether a run began here, and ended before its first checkpoint."""
    try:
        read_config(TrainConfig, out / CONFIG)
        return {"model", "text", "codec", "image_size"} <= json.loads((out / CONFIG).read_text(encoding="utf-8")).keys()
    except ValueError:
        return False


def keep_encoder(made: Path, out: Path) -> None:
    """Copy the language model that was made for a run into its folder; ValueError where another is there already."""
    kept, names = out / TEXT_ENCODER, sorted(path.name for path in made.iterdir())
    if kept.exists():
        _, other, missing = filecmp.cmpfiles(made, kept, names, shallow=False)
        if not other and not missing:
            return
        raise ValueError(f"{kept} is there already, and another model than this run's: choose another --out")
    with written_whole(kept) as scratch:
        shutil.copytree(made, scratch)


def going_on(run: Path, checkpoint: Path, steps: int | None) -> tuple[TrainConfig, list[str]]:
    """The configuration that a run goes on with: its checkpoint's, to the step ``steps`` or where the run was to end.

    And what is to be told of it, such as what ``config.json`` says otherwise, of which only ``steps`` is heeded.
    ValueError for a step that is past.
    """
    cfg = from_dict(TrainConfig, read_run_config(checkpoint))
    done = read_state(checkpoint)["step"]
    told, words = _edited(run, cfg)
    if told is not None and steps is None and told.steps != cfg.steps:
        heeded = told.steps >= done
        what = "the run goes on to there" if heeded else f"not heeded, for step {done} is done; the run goes on"
        words.append(f"{run / CONFIG} says {told.steps} steps: {what} instead of to step {cfg.steps}")
        steps = told.steps if heeded else None
    if steps is None or steps == cfg.steps:
        return cfg, words
    if steps < max(done, 1):
        raise ValueError(f"step {steps} is past: {checkpoint} has {done} steps done; give --steps a larger number")
    if cfg.optim.decay != "constant":
        before, after = (set_rates([], cfg.optim, min(done, end), end) for end in (cfg.steps, steps))
        words.append(
            f"the {cfg.optim.decay} decay of the learning rate now ends at step {steps} instead of {cfg.steps}: after "
            f"step {done} the rate goes on at {after:.3g} of its peak instead of {before:.3g}"
        )
    return replace(cfg, steps=steps), words


def _edited(run: Path, cfg: TrainConfig) -> tuple[TrainConfig | None, list[str]]:
    """What a run's ``config.json`` says, where that can be read, and a word on the settings that are not heeded."""
    path = run / CONFIG
    if not path.exists():
        return None, []
    try:
        told = read_config(TrainConfig, path)
    except ValueError as error:
        return None, [f"{path} is not heeded, for the checkpoint has the run's settings: {error}"]
    other = [name for name in differing(to_dict(cfg), to_dict(told)) if name != "steps"]
    if not other:
        return told, []
    return told, [
        f"{path} was edited and is not heeded in {', '.join(other)}: a run keeps the settings that its checkpoint "
        f"has. For other settings begin a new one: semroute train --config {shlex.quote(str(path))} --out DIR"
    ]


def differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of nested settings that are not the same."""
    found = []
    for name in one:
        if isinstance(one[name], dict) and isinstance(other.get(name), dict):
            found += differing(one[name], other[name], f"{prefix}{name}.")
        elif one[name] != other.get(name):
            found.append(prefix + name)
    return found


def note_steps(run: Path, cfg: TrainConfig) -> None:
    """Let ``config.json`` say where the run now ends, so that another resumption goes there, too."""
    path = run / CONFIG
    try:
        told = read_config(TrainConfig, path)
    except ValueError:  # there is none, or one that is not heeded
        return
    if told.steps != cfg.steps:
        write_text(path, json.dumps(to_dict(replace(told, steps=cfg.steps)), indent=2) + "\n")


def located_run(cfg: TrainConfig, folder: str | None) -> TrainConfig:
    """A run's configuration with relative paths as they were meant in the folder where it was started."""
    data, checked = cfg.data, cfg.validation
    return replace(
        cfg,
        data=replace(
            data,
            paths=tuple(located(path, folder) for path in data.paths),
            index=located(data.index, folder),
            sidecar=located(data.sidecar, folder),
        ),
        validation=replace(checked, paths=tuple(located(path, folder) for path in checked.paths)),
        text=located_model(cfg.text, folder),
        codec=located_model(cfg.codec, folder),
    )
