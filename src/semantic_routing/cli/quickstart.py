"""``semroute quickstart``: trains, samples, scores and reports on one machine in minutes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from semantic_routing.analysis.report import write_report
from semantic_routing.checkpoint.load import checkpoints, find_checkpoint
from semantic_routing.common.config import from_dict
from semantic_routing.common.device import pick_device
from semantic_routing.common.files import check_writable, read_json_lines, write_text
from semantic_routing.common.locks import claimed
from semantic_routing.common.troubles import Troubles, say
from semantic_routing.data.dataset import open_data
from semantic_routing.evaluation.shapes import evaluate_shapes
from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
from semantic_routing.sampling.load import load_bundle, read_run_config
from semantic_routing.sampling.text_to_image import check_guidance
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TINY
from semantic_routing.toy.captions import TAGS
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import resume, start
from semantic_routing.training.recipes import TOY_SAMPLING, toy
from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
from semantic_routing.training.tracking import METRICS

LIMIT, SCORING = 840, 150
"""Seconds that the command may take, and those of them that are left for scores and report after the training.
With the installation it is a quarter of an hour."""
LEAST_TRAINING = 60
"""Seconds of training on a machine that needs all of its time for the language model."""
MOST_PROMPTS = 440
"""Prompts that are scored on a machine that has the time for them: forty of each tag."""
IMAGE_STEPS = 0.45
"""Time to sample an image, in training steps: 0.40 to 0.47 on two machines, idle and busy (docs/log.md)."""
MOST_STEPS = 4200
"""Training steps of a machine that has the time for them."""
KEEP = "4GiB"
"""Main memory for the states of a real language model: those of 12,000 captions of SmolLM2."""
LOCK_FILE = ".quickstart.lock"
"""Different from the lock of the training in the same folder."""


@dataclass(frozen=True, kw_only=True)
class QuickstartArguments:
    """Train a toy model, sample from it, score it exactly and write a report."""

    out: Path = Path("runs/quickstart")
    """Folder of the run; a stopped quickstart resumes there."""
    arm: str = DEFAULT_ARM
    """Routing strategy (B1 B2 B3 S1 S2 S3 FuseDiT, or their names)."""
    text: Literal["tiny", "smollm2"] = "tiny"
    """Text encoder: a tiny language model that is trained first, or the pretrained SmolLM2-135M, which needs 6 GiB of
    memory."""
    steps: int | None = None
    """Training steps, which make the run repeatable; by default as many as the clock allows, at most 4,200, so that
    the command takes about fourteen minutes on a busy machine, too."""
    prompts: int | None = None
    """Number of unseen prompts to score, spread evenly over the eleven tags; by default 440, or fewer if the clock ends
    the training and the machine is too slow for as many."""
    guidance: float = TOY_SAMPLING.guidance
    """Classifier-free guidance scale."""
    seed: int = 42
    """Random seed of the run."""

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts is {self.prompts}; scoring needs at least 1")
        check_guidance(self.guidance)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")


def run_quickstart(args: QuickstartArguments) -> Path:
    """Train, sample, score and write the report; return its path."""
    out = args.out
    check_writable(out)
    with claimed(out / LOCK_FILE, out):
        return _run(args, configuration(args))


def configuration(args: QuickstartArguments) -> TrainConfig:
    """Return the training configuration; if SmolLM2 is missing, report it and use the tiny language model."""
    cfg = replace(toy(parse_arm(args.arm)), seed=args.seed, steps=MOST_STEPS)
    if args.text == TINY:
        return cfg
    text = replace(cfg.text, name_or_path=args.text, keep=KEEP)
    try:
        shape = text_shape(text)
    except ValueError as error:
        say(f"{error}; the quickstart uses the tiny language model instead")
        return cfg
    return replace(cfg, text=text, model=replace(cfg.model, text_width=shape.width, text_layers=len(shape.layers)))


def _run(args: QuickstartArguments, cfg: TrainConfig) -> Path:
    out, timings, began = args.out, Timings(args.out / "timings.json"), time.monotonic()
    with timings.measured("train"):
        if checkpoints(out):
            _check_same(args, cfg)
            resume(out)
        else:
            train_anew(args, cfg, began)
    with timings.measured("evaluate"):
        bundle = load_bundle(out, pick_device())
        sampling = replace(TOY_SAMPLING, guidance=args.guidance)
        evaluate_shapes(bundle, out / "evaluation", n=prompts_in_time(args), seed=0, cfg=sampling)
    return write_report(out, out / "evaluation", out, timings.seconds)


def train_anew(args: QuickstartArguments, cfg: TrainConfig, began: float) -> None:
    """Train ``args.steps`` steps or, by default, as many as the clock leaves time for.

    The tiny language model is made first, so that its time is known.
    """
    if args.steps is not None:
        start(replace(cfg, steps=args.steps), args.out)
        return
    if cfg.text.name_or_path == TINY:
        tiny_lm(training_corpus(open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)))
    left = LIMIT - SCORING - (time.monotonic() - began)
    minutes = round(max(left, LEAST_TRAINING) / 60, 1)
    say(f"Training for {minutes} minutes or {cfg.steps} steps, whichever ends first (--steps fixes their number)")
    start(replace(cfg, minutes=minutes), args.out)


def prompts_in_time(args: QuickstartArguments) -> int:
    """Return the number of prompts to score: by default as many as ``SCORING`` seconds allow, by the time of a step.

    A stopped quickstart that resumes scores as many: the number depends on the files of the run alone.
    """
    if args.prompts is not None or args.steps is not None:
        return args.prompts or MOST_PROMPTS
    rows = read_json_lines(args.out / METRICS, "the metrics of a run")
    step = statistics.median(row["step_s"] for row in rows if "step_s" in row)
    fit = int(SCORING / (IMAGE_STEPS * step))
    found = min(MOST_PROMPTS, max(fit - fit % len(TAGS), len(TAGS)))
    if found < MOST_PROMPTS:
        say(f"Scoring {found} prompts, as many as there is time for (--prompts fixes their number)")
    return found


def _check_same(args: QuickstartArguments, cfg: TrainConfig) -> None:
    """Raise ValueError if the folder holds a run with other settings."""
    there = from_dict(TrainConfig, read_run_config(find_checkpoint(args.out)))
    model = replace(cfg.model, text_width=there.model.text_width, text_layers=there.model.text_layers)
    length = {"steps": there.steps, "minutes": there.minutes} if args.steps is None else {"steps": args.steps}
    if replace(cfg, model=model, **length) != there:
        raise ValueError(
            f"{args.out} holds another run (arm {there.model.arm}, {there.steps} steps, seed {there.seed}); "
            "choose another --out or delete it"
        )


class Timings:
    """Seconds spent on each part of a run, summed over interruptions and kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Add the time of the context, even if it ends in an error."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            with Troubles().survived(self.path, ValueError):
                write_text(self.path, json.dumps(self.seconds, indent=2) + "\n")
