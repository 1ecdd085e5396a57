"""``semroute quickstart``: trains, samples, scores and reports on one machine in minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

from semantic_routing.analysis.report import write_report
from semantic_routing.checkpoint.load import checkpoints, find_checkpoint
from semantic_routing.common.config import from_dict
from semantic_routing.common.device import keep_freed_memory, pick_device
from semantic_routing.common.files import check_writable, write_text
from semantic_routing.common.locks import claimed
from semantic_routing.common.troubles import Troubles, say
from semantic_routing.data.dataset import open_data
from semantic_routing.data.loader import Loader
from semantic_routing.evaluation.shapes import evaluate_shapes
from semantic_routing.model.arms import DEFAULT_ARM, parse_arm
from semantic_routing.sampling.load import load_bundle, read_run_config
from semantic_routing.sampling.text_to_image import check_guidance
from semantic_routing.text.architecture import text_shape
from semantic_routing.text.config import TINY
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.loop import resume, start
from semantic_routing.training.recipes import TOY_SAMPLING, toy
from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
from semantic_routing.training.trainer import Trainer

TRAIN_SECONDS = 540
"""Time limit of the training, chosen so that everything, including installation, takes a quarter of an hour."""
MOST_STEPS = 4200
"""Training steps of a machine that has the time for them."""
KEEP = "4GiB"
"""Main memory for the states of a real language model: those of 12,000 captions of SmolLM2."""
NEW_CAPTIONS = 0.3
"""Share of captions that a run encodes: of 1,200 steps with SmolLM2's states in ``KEEP`` (docs/log.md)."""
LOCK_FILE = ".quickstart.lock"
"""Different from the lock of the training in the same folder."""
TRIAL_STEPS, WARM_UP = 24, 8
"""Steps of the trial that measures the machine's speed, and the first of them that do not count."""


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
    """Training steps; by default as many as fit into nine minutes, at most 4,200."""
    prompts: int = 440
    """Number of unseen prompts to score, spread evenly over the eleven tags."""
    guidance: float = TOY_SAMPLING.guidance
    """Classifier-free guidance scale."""
    seed: int = 42
    """Random seed of the run."""

    def __post_init__(self) -> None:
        if self.prompts < 1:
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
    out, timings = args.out, Timings(args.out / "timings.json")
    with timings.measured("train"):
        if checkpoints(out):
            _check_same(cfg if args.steps is None else replace(cfg, steps=args.steps), out, args.steps is None)
            resume(out)
        else:
            start(replace(cfg, steps=affordable_steps(cfg) if args.steps is None else args.steps), out)
    with timings.measured("evaluate"):
        bundle = load_bundle(out, pick_device())
        sampling = replace(TOY_SAMPLING, guidance=args.guidance)
        evaluate_shapes(bundle, out / "evaluation", n=args.prompts, seed=0, cfg=sampling)
    return write_report(out, out / "evaluation", out, timings.seconds)


def affordable_steps(cfg: TrainConfig) -> int:
    """Return the configured steps or, on a slow machine, as many hundreds of steps as fit into ``TRAIN_SECONDS``.

    A short trial measures the time per step. The number is stored in the run's configuration, so the run is as
    reproducible as any other.
    """
    seconds = step_seconds(cfg)
    steps = min(cfg.steps, max(100, int(TRAIN_SECONDS / seconds) // 100 * 100))
    if steps < cfg.steps:
        say(
            f"A step takes {seconds:.2f} s here: training {steps} steps instead of {cfg.steps}, to finish in minutes "
            f"(--steps {cfg.steps} trains them all)"
        )
    return steps


def step_seconds(cfg: TrainConfig) -> float:
    """Measure the mean time of a training step in seconds, with ``NEW_CAPTIONS`` of the captions to encode."""
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    text = cfg.text
    if text.name_or_path == TINY:
        text = replace(text, name_or_path=str(tiny_lm(training_corpus(data))))
    keep_freed_memory()
    with TemporaryDirectory() as scratch:
        trainer = Trainer(cfg, Path(scratch), text=text)
        latent = trainer.bundle.codec.latent_shape(cfg.image_size)
        loader = Loader(data, batch=cfg.batch, noise_shape=latent)
        parts = []
        for step in range(TRIAL_STEPS):
            began = time.perf_counter()
            batch = loader.load(step)
            loaded = time.perf_counter()
            trainer.prepare(batch)
            encoded = time.perf_counter()
            trainer.advance(trainer.prepare(batch))  # the states are kept now
            parts.append((encoded - loaded, loaded - began + time.perf_counter() - encoded))
    encoding, others = (median(part) for part in zip(*parts[WARM_UP:], strict=True))
    return others + NEW_CAPTIONS * encoding


def _check_same(cfg: TrainConfig, out: Path, any_steps: bool) -> None:
    """Raise ValueError if ``out`` holds a run with another configuration than ``cfg``."""
    there = from_dict(TrainConfig, read_run_config(find_checkpoint(out)))
    model = replace(cfg.model, text_width=there.model.text_width, text_layers=there.model.text_layers)
    if replace(cfg, model=model, steps=there.steps if any_steps else cfg.steps) != there:
        raise ValueError(
            f"{out} holds another run (arm {there.model.arm}, {there.steps} steps, seed {there.seed}); "
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
