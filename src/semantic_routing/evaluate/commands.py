"""The benchmarks that ``semroute evaluate`` knows: for each its arguments and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from semantic_routing.device import keep_freed_memory, pick_device
from semantic_routing.evaluate.scores import evaluate_shapes, markdown_table
from semantic_routing.generate import SampleConfig, load_bundle
from semantic_routing.recipes import TOY_SAMPLING


@dataclass(frozen=True, kw_only=True)
class ShapesArguments(SampleConfig):
    """Score a model on unseen captions of the toy world with the exact checker."""

    model: Path
    """A run's folder, or one of its checkpoints."""
    out: Path
    """Folder for images, records.jsonl, summary.json, table.md and manifest.json; a stopped evaluation goes on."""
    n: int = 440
    """Prompts, spread evenly over the eleven tags."""
    prompt_seed: int = 0
    """Which prompts."""
    sampler: Literal["euler", "heun", "ancestral"] = TOY_SAMPLING.sampler
    """Integrator of the flow, or ancestral: the image predicted and noised anew at every step."""
    steps: int = TOY_SAMPLING.steps
    """Steps of the sampler."""
    guidance: float = TOY_SAMPLING.guidance
    """Scale of classifier-free guidance; 1 is none."""
    shift: float = TOY_SAMPLING.shift
    """Above 1, more steps near the noise."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least 1 prompt")


def shapes(args: ShapesArguments) -> str:
    """Evaluate and answer with the table."""
    keep_freed_memory()
    bundle = load_bundle(args.model, pick_device(args.device))
    return markdown_table(evaluate_shapes(bundle, args.out, n=args.n, seed=args.prompt_seed, cfg=args))


BENCHMARKS: dict[str, tuple[type, Callable[[Any], str]]] = {"shapes": (ShapesArguments, shapes)}
