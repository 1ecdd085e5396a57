"""What the commands about training runs share: the configuration to start from, and the options beside --resume."""

from __future__ import annotations

from pathlib import Path

from semantic_routing.cli.arguments import parse
from semantic_routing.common.config import nearest, read_config
from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import ResumeArguments
from semantic_routing.training.recipes import RECIPES


def default_config(command: str, recipe: str, arm: str | None, config: Path | None) -> TrainConfig:
    """Return the configuration that settings are changed in: that of --config or of the recipe."""
    if config is not None:
        if recipe or arm:
            raise ValueError("--config is a whole configuration: leave out the recipe and --arm")
        return read_config(TrainConfig, config)
    if recipe not in RECIPES:
        what = f"unknown recipe {recipe!r}" if recipe else f"{command} needs a recipe first"
        raise ValueError(f"{what}; {nearest(recipe, list(RECIPES))}")
    return RECIPES[recipe](parse_arm(arm or DEFAULT_ARM))


def resume_arguments(command: str, settings: list[str], *, alone: bool) -> ResumeArguments:
    """Parse what stands beside --resume; ValueError for settings, or unless the options stand ``alone``."""
    named = {arg.partition("=")[0] for arg in settings if arg.startswith("--")}
    if not alone or named - {"--steps", "--accept-changes", "--help"}:
        raise ValueError(
            "--resume takes a run's folder and no settings: they are in its checkpoint; beside it there are only "
            "--steps N, to train on to step N, and --accept-changes, to go on with data or models that changed"
        )
    return parse(ResumeArguments, settings, prog=f"{command} --resume DIR")
