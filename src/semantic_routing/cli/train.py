"""``semroute train``: begins a run from a recipe or a configuration, or resumes one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from semantic_routing.cli.arguments import options, parse, parse_known
from semantic_routing.common.config import nearest, read_config
from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
from semantic_routing.training import loop
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """The options of ``semroute train`` beside the recipe's settings."""

    arm: str | None = None
    """Conditioning strategy of a recipe."""
    config: Path | None = None
    """A run's config.json to start from, instead of a recipe."""
    out: Path | None = None
    """Folder of the new run."""
    resume: Path | None = None
    """Folder of a run to continue, instead of a new one."""


def run_train(args: list[str], usage: str) -> Path:
    """Train as ``args`` say and return the last checkpoint; ``usage`` is printed above the settings by --help."""
    recipe, given = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    own, settings = parse_known(TrainArguments, given, prog="semroute train")
    if own.resume is not None:
        return _resume(own.resume, settings, alone=not recipe and own == TrainArguments(resume=own.resume))
    wants_help = not {"-h", "--help"}.isdisjoint(settings)
    default = _default(recipe or ("toy" if wants_help and own.config is None else ""), own)
    if wants_help:
        sys.stdout.write(f"{usage}\n\n")
    prog = f"semroute train {recipe or 'RECIPE'}"
    cfg = parse(TrainConfig, settings, prog=prog, default=default, beside=tuple(options(TrainArguments)))
    if own.out is None:
        raise ValueError("where should the run be written? give --out, such as --out runs/x")
    return loop.start(cfg, own.out)


def _resume(run: Path, settings: list[str], *, alone: bool) -> Path:
    named = {arg.partition("=")[0] for arg in settings if arg.startswith("--")}
    if not alone or named - {"--steps", "--accept-changes", "--help"}:
        raise ValueError(
            "--resume takes a run's folder and no settings: they are in its checkpoint; beside it there are only "
            "--steps N, to train on to step N, and --accept-changes, to go on with data or models that changed"
        )
    how = parse(loop.ResumeArguments, settings, prog="semroute train --resume DIR")
    return loop.resume(run, steps=how.steps, accept_changes=how.accept_changes)


def _default(recipe: str, own: TrainArguments) -> TrainConfig:
    """Return the configuration that settings are changed in: that of --config or of the recipe."""
    if own.config is not None:
        if recipe or own.arm:
            raise ValueError("--config is a whole configuration: leave out the recipe and --arm")
        return read_config(TrainConfig, own.config)
    if recipe not in RECIPES:
        what = f"unknown recipe {recipe!r}" if recipe else "semroute train needs a recipe first"
        raise ValueError(f"{what}; {nearest(recipe, list(RECIPES))}")
    return RECIPES[recipe](parse_arm(own.arm or DEFAULT_ARM))
