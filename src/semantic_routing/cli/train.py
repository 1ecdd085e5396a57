"""``semroute train``: starts a run from a recipe or a configuration, or resumes one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from semantic_routing.cli.arguments import options, parse, parse_known
from semantic_routing.cli.runs import default_config, resume_arguments
from semantic_routing.training import loop
from semantic_routing.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """The options of ``semroute train`` besides the recipe's settings."""

    arm: str | None = None
    """Routing strategy of the recipe."""
    config: Path | None = None
    """The config.json of a run to start from, instead of a recipe."""
    out: Path | None = None
    """Folder of the new run."""
    resume: Path | None = None
    """Folder of a run to resume, instead of starting a new one."""


def run_train(args: list[str], usage: str) -> Path:
    """Train as ``args`` say and return the last checkpoint; ``usage`` is printed above the settings by --help."""
    recipe, given = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    own, settings = parse_known(TrainArguments, given, prog="semroute train")
    if own.resume is not None:
        alone = not recipe and own == TrainArguments(resume=own.resume)
        how = resume_arguments("semroute train", settings, alone=alone)
        return loop.resume(own.resume, steps=how.steps, accept_changes=how.accept_changes)
    wants_help = not {"-h", "--help"}.isdisjoint(settings)
    named = recipe or ("toy" if wants_help and own.config is None else "")
    default = default_config("semroute train", named, own.arm, own.config)
    if wants_help:
        sys.stdout.write(f"{usage}\n\n")
    prog = f"semroute train {recipe or 'RECIPE'}"
    cfg = parse(TrainConfig, settings, prog=prog, default=default, beside=tuple(options(TrainArguments)))
    if own.out is None:
        raise ValueError("give the folder of the new run, such as --out runs/x")
    return loop.start(cfg, own.out)
