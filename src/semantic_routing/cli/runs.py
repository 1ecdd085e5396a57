"""Shared by the commands that train: the configuration to start from, and the options allowed with --resume."""

from __future__ import annotations

from pathlib import Path

from semantic_routing.cli.arguments import parse
from semantic_routing.common.config import nearest, read_config
from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import ResumeArguments
from semantic_routing.training.recipes import RECIPES


def default_config(command: str, recipe: str, arm: str | None, config: Path | None) -> TrainConfig:
    """Return the configuration of --config or of the recipe, to which settings are applied."""
    if config is not None:
        if recipe or arm:
            raise ValueError("--config is a whole configuration: leave out the recipe and --arm")
        return read_config(TrainConfig, config)
    if recipe not in RECIPES:
        what = f"unknown recipe {recipe!r}" if recipe else f"{command} needs a recipe"
        raise ValueError(f"{what}; {nearest(recipe, list(RECIPES))}")
    return RECIPES[recipe](parse_arm(arm or DEFAULT_ARM))


def resume_arguments(command: str, settings: list[str], *, alone: bool) -> ResumeArguments:
    """Parse the options given with --resume.

    Raises ValueError if there are settings among them, or other options of the command (``alone`` is False).
    """
    named = {arg.partition("=")[0] for arg in settings if arg.startswith("--")}
    if not alone or named - {"--steps", "--accept-changes", "--help"}:
        raise ValueError(
            "--resume takes the settings from the run's checkpoint: leave them out; the only options are --steps N, to "
            "train up to step N, and --accept-changes, to resume although data or models have changed"
        )
    return parse(ResumeArguments, settings, prog=f"{command} --resume DIR")
