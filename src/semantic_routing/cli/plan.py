"""``semroute plan``: predicts time, memory, cost and bottleneck of a run on GPUs before they are rented."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from semantic_routing.analysis.planning.counts import count_all
from semantic_routing.analysis.planning.hardware import Assumptions
from semantic_routing.analysis.planning.layout import check_groups
from semantic_routing.analysis.planning.plan import find_gpu, plan, to_json
from semantic_routing.analysis.planning.report import report
from semantic_routing.cli.arguments import FLAT, options, parse, parse_known
from semantic_routing.cli.runs import default_config
from semantic_routing.common.config import check_finite, to_dict
from semantic_routing.common.files import check_writable, write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """The options of ``semroute plan`` besides the recipe's settings."""

    gpus: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs to plan for."""
    gpu: str = "H100"
    """Type of GPU: A100, H100, H200 or B200."""
    text_tokens: int = 256
    """Length of the prompts in tokens."""
    price_per_gpu_hour: float | None = None
    """Price per GPU and hour, for the cost of the run."""
    arm: str | None = None
    """Routing strategy of the recipe."""
    config: Path | None = None
    """The config.json of a run to plan for, instead of a recipe."""
    json: Path | None = None
    """JSON file for the numbers; without a name, or with -, JSON is printed instead of the tables."""
    assumed: Annotated[Assumptions, FLAT] = field(default_factory=Assumptions)
    """The cluster."""


def run_plan(args: list[str], usage: str) -> str:
    """Plan a recipe or a configuration and return the text to print; ``usage`` is printed by --help."""
    recipe, given = (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)
    if not {"-h", "--help"}.isdisjoint(given):
        sys.stdout.write(f"{usage}\n\n")
        parse(PlanArguments, ["--help"], prog="semroute plan RECIPE")
    own, settings = parse_known(PlanArguments, given, prog="semroute plan")
    check_finite(own)
    default = default_config("semroute plan", recipe, own.arm, own.config)
    cfg = parse(TrainConfig, settings, prog="semroute plan", default=default, beside=tuple(options(PlanArguments)))
    if not own.gpus:
        raise ValueError("nothing to plan: give --gpus with one or several numbers")
    if own.price_per_gpu_hour is not None and own.price_per_gpu_hour < 0:
        raise ValueError(f"price_per_gpu_hour is {own.price_per_gpu_hour:g}; it must be at least 0")
    name = find_gpu(own.gpu)
    if own.json not in (None, Path("-")):
        check_writable(own.json.parent)
    for gpus in own.gpus:  # before counting, which takes seconds
        check_groups(cfg, gpus, own.assumed)
    counts = count_all(cfg, own.text_tokens)
    plans = [plan(cfg, counts, name, gpus, own.assumed) for gpus in own.gpus]
    facts = manifest(config=to_dict(cfg), seeds={"failures": cfg.seed}) if own.json is not None else {}
    numbers = to_json(plans, counts, own.assumed, own.price_per_gpu_hour) | {"gpu": name, "manifest": facts}
    if own.json == Path("-"):
        return json.dumps(numbers, indent=2)
    if own.json is not None:
        write_text(own.json, json.dumps(numbers, indent=2) + "\n")
    return report(cfg, counts, plans, name, own.text_tokens, own.assumed, own.price_per_gpu_hour)
