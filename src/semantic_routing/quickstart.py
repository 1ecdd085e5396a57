"""The whole method on one machine in minutes: train, sample, score, report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from semantic_routing.checkpoint import checkpoints, write_text
from semantic_routing.device import pick_device
from semantic_routing.evaluate.scores import evaluate_shapes
from semantic_routing.fusion import parse_arm
from semantic_routing.generate import load_bundle
from semantic_routing.recipes import TOY_SAMPLING, toy
from semantic_routing.report import write_report
from semantic_routing.train import resume, start


@dataclass(frozen=True, kw_only=True)
class QuickstartArguments:
    """Train a toy model, sample from it, score it exactly and write a report."""

    out: Path = Path("runs/quickstart")
    """Folder of the run; a quickstart that was stopped goes on."""
    arm: str = "depth"
    """Conditioning strategy (B1 B2 B3 S1 S2 S3 FuseDiT, or their names)."""
    steps: int | None = None
    """Training steps, where not the recipe's."""
    prompts: int = 440
    """Unseen prompts to score, spread evenly over the eleven tags."""
    guidance: float = TOY_SAMPLING.guidance
    """Scale of classifier-free guidance."""
    seed: int = 42
    """Seed of the run."""

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"prompts is {self.prompts}; scoring needs at least 1")


def run_quickstart(args: QuickstartArguments) -> Path:
    """Do it all; returns the report's path."""
    out, timings = args.out, Timings(args.out / "timings.json")
    cfg = replace(toy(parse_arm(args.arm)), seed=args.seed)
    cfg = cfg if args.steps is None else replace(cfg, steps=args.steps)
    with timings.measured("train"):
        if checkpoints(out):
            resume(out)
        else:
            start(cfg, out)
    with timings.measured("evaluate"):
        bundle = load_bundle(out, pick_device())
        sampling = replace(TOY_SAMPLING, guidance=args.guidance)
        evaluate_shapes(bundle, out / "evaluation", n=args.prompts, seed=0, cfg=sampling)
    return write_report(out, out / "evaluation", out, timings.seconds)


class Timings:
    """Seconds spent on each part of a run, added up over interruptions in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Add the time that the block takes, however it ends."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            if self.path.parent.is_dir():
                write_text(self.path, json.dumps(self.seconds, indent=2) + "\n")
