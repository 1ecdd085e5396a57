"""The folder of a run: checks before a new run, and what a resumed run reads there."""

from __future__ import annotations

import filecmp
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from semantic_routing.checkpoint.load import STATE, checkpoints, find_checkpoint, read_state
from semantic_routing.common.config import from_dict, read_config, to_dict
from semantic_routing.common.distributed import World
from semantic_routing.common.files import check_writable, write_text, written_whole
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.data.damage import FILE as DAMAGED
from semantic_routing.sampling.load import TEXT_ENCODER
from semantic_routing.sampling.located import located, located_data, located_model
from semantic_routing.training.config import RunConfig, TrainConfig
from semantic_routing.training.optim import set_rates
from semantic_routing.training.tracking import IDENTITY, METRICS

CONFIG, MANIFEST = "config.json", "manifest.json"
WRITTEN = (CONFIG, MANIFEST, METRICS, DAMAGED, IDENTITY)
"""Files of a run that replace files of the same name."""
C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Kind(Generic[C]):
    """Kind of a run: its settings, its command and the files that only it writes."""

    config: type[C]
    command: str
    needs: frozenset[str]
    """Names in ``config.json`` and in a checkpoint's configuration that tell such runs from others."""
    writes: tuple[str, ...] = ()

    @property
    def again(self) -> str:
        """Command that resumes such a run."""
        return f"{self.command} --resume"

    def read(self, checkpoint: Path) -> C:
        """Return the configuration of the run that wrote a checkpoint; ValueError for a run of another kind."""
        config = read_state(checkpoint).get("config")
        if not isinstance(config, dict) or not self.needs <= config.keys():
            raise ValueError(
                f"{checkpoint} was not written by {self.command}: resume it with the command that wrote it"
            )
        return from_dict(self.config, config)


TRAIN = Kind(TrainConfig, "semroute train", frozenset({"model", "text", "codec", "image_size"}))


@contextmanager
def claimed_run(world: World, out: Path) -> Iterator[None]:
    """Lock a run's folder against other jobs within the context; the first process holds the lock for all."""
    with ExitStack() as held:

        def claim() -> None:
            check_writable(out)
            held.enter_context(claimed(out / LOCK, out))

        world.on_first(claim)
        yield


def run_of(path: Path) -> Path:
    """Return the run's folder for a path to it or to one of its checkpoints; ValueError if it has no checkpoint."""
    run = path.parent.parent if (path / STATE).is_file() else path
    if not checkpoints(run):
        find_checkpoint(path)  # raises with the reason
    return run


def latest(path: Path) -> Path:
    """Return the checkpoint to resume; raise ValueError if ``path`` is an older one."""
    folder = find_checkpoint(path)
    if folder == path and folder != find_checkpoint(folder.parent.parent):
        raise ValueError(f"{folder} is not its run's latest checkpoint; to resume from it, move the later ones away")
    return folder


def check_new(out: Path, kind: Kind = TRAIN) -> None:
    """Raise ValueError if a folder has a run, or other files that a run would replace."""
    if checkpoints(out):
        raise ValueError(f"{out} already holds a run: resume it with `{kind.again} {out}` or choose another --out")
    check_writable(out)
    there = [out / name for name in (*WRITTEN, *kind.writes) if (out / name).exists()]
    if there and not _begun(out, kind):
        raise ValueError(f"{there[0]} exists and does not belong to a run: choose another --out, or move it away")


def _begun(out: Path, kind: Kind) -> bool:
    """Return whether a run was started here and ended before its first checkpoint."""
    try:
        read_config(kind.config, out / CONFIG)
        return kind.needs <= json.loads((out / CONFIG).read_text(encoding="utf-8")).keys()
    except ValueError:
        return False


def keep_encoder(made: Path, out: Path) -> None:
    """Copy a run's own language model into its folder; raise ValueError if another one is there."""
    kept, names = out / TEXT_ENCODER, sorted(path.name for path in made.iterdir())
    if kept.exists():
        _, other, missing = filecmp.cmpfiles(made, kept, names, shallow=False)
        if not other and not missing:
            return
        raise ValueError(f"{kept} exists and is not the language model of this run: choose another --out")
    with written_whole(kept) as scratch:
        shutil.copytree(made, scratch)


def going_on(run: Path, checkpoint: Path, steps: int | None, kind: Kind[C]) -> tuple[C, list[str]]:
    """Return the configuration of a resumed run, and messages about it.

    It is the checkpoint's configuration, with ``steps`` as the last step if given; that lifts a time limit that has
    ended the run. An edited ``config.json`` may change the last step; messages report its other changes, which are
    ignored. Raises ValueError for a last step that is already done.
    """
    cfg, state = kind.read(checkpoint), read_state(checkpoint)
    done, clock = state["step"], _clock(cfg, state)
    edited, words = _edited(run, cfg, kind)
    if edited is not None and steps is None and edited.steps != cfg.steps:
        if edited.steps >= done:
            steps = edited.steps
            what = f"the run continues to that step instead of step {cfg.steps}"
        else:
            what = f"ignored, because step {done} is already done; the run continues to step {cfg.steps}"
        words.append(f"{run / CONFIG} says {edited.steps} steps: {what}")
    if steps is None or (steps == cfg.steps and clock < 1):
        return cfg, words
    if steps < max(done, 1):
        raise ValueError(f"step {steps} is already done: {checkpoint} is at step {done}; give --steps a larger number")
    asked = replace(cfg, steps=steps)
    if clock >= 1 and isinstance(asked, TrainConfig):
        asked = replace(asked, minutes=0.0)
        words.append(f"the run's time is over: it continues to step {steps} without a time limit")
    if cfg.optim.decay != "constant":
        parts = max(done / cfg.steps, clock), max(done / steps, clock if clock < 1 else 0)
        before, after = (
            set_rates([], cfg.optim, min(done, end), min(part, 1))
            for end, part in zip((cfg.steps, steps), parts, strict=True)
        )
        words.append(
            f"the {cfg.optim.decay} decay of the learning rate now ends at step {steps} instead of {cfg.steps}: after "
            f"step {done} it continues at {after:.3g} of its peak instead of {before:.3g}"
        )
    return asked, words


def _clock(cfg: RunConfig, state: dict[str, Any]) -> float:
    """Return which part of its time limit a run has taken; 0 without a limit."""
    limit = 60 * cfg.minutes if isinstance(cfg, TrainConfig) else 0
    return state.get("seconds", 0) / limit if limit else 0


def _edited(run: Path, cfg: C, kind: Kind[C]) -> tuple[C | None, list[str]]:
    """Return a run's ``config.json`` if it is readable, and messages about the settings in it that are ignored."""
    path = run / CONFIG
    if not path.exists():
        return None, []
    try:
        edited = read_config(kind.config, path)
    except ValueError as error:
        return None, [f"{path} is ignored, because a run takes its settings from its checkpoint: {error}"]
    other = [name for name in differing(to_dict(cfg), to_dict(edited)) if name != "steps"]
    if not other:
        return edited, []
    return edited, [
        f"{path} was edited; the edits of {', '.join(other)} are ignored, because a run keeps the settings of its "
        "checkpoint. "
        f"For other settings start a new run: {kind.command} --config {shlex.quote(str(path))} --out DIR"
    ]


def differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of nested settings that differ."""
    found = []
    for name in one:
        if isinstance(one[name], dict) and isinstance(other.get(name), dict):
            found += differing(one[name], other[name], f"{prefix}{name}.")
        elif one[name] != other.get(name):
            found.append(prefix + name)
    return found


def note_steps(run: Path, cfg: RunConfig) -> None:
    """Write the run's last step and time limit into ``config.json``; they apply when the run is resumed again, too."""
    path = run / CONFIG
    try:
        edited = read_config(type(cfg), path)
    except ValueError:  # missing or unreadable
        return
    limit: dict[str, Any] = {"minutes": cfg.minutes} if isinstance(cfg, TrainConfig) else {}
    if edited != (noted := replace(edited, steps=cfg.steps, **limit)):
        write_text(path, json.dumps(to_dict(noted), indent=2) + "\n")


def located_run(cfg: TrainConfig, folder: str | None) -> TrainConfig:
    """Resolve a run's relative paths from the folder where it was started."""
    cfg = located_run_data(cfg, folder)
    distill = replace(cfg.distill, teacher=located(cfg.distill.teacher, folder))
    text, codec = located_model(cfg.text, folder), located_model(cfg.codec, folder)
    return replace(cfg, text=text, codec=codec, distill=distill)


def located_run_data(cfg: C, folder: str | None) -> C:
    """Resolve the relative paths of a run's data from the folder where it was started."""
    checked = replace(cfg.validation, paths=tuple(located(path, folder) for path in cfg.validation.paths))
    return replace(cfg, data=located_data(cfg.data, folder), validation=checked)
