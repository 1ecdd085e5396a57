"""The benchmarks of the generated worlds: unseen captions of every tag, and images that are checked exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from semantic_routing import __version__
from semantic_routing.common.distributed import ALONE, Processes
from semantic_routing.evaluation.benchmark import Benchmark, Finding, Prompt, Task
from semantic_routing.evaluation.records import CORRECT
from semantic_routing.evaluation.run import evaluate_model
from semantic_routing.evaluation.summary import Columns, tag_columns
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.toy.captions import GENEVAL_TAGS
from semantic_routing.toy.captions import TAGS as TOY_TAGS
from semantic_routing.toy.checker import check
from semantic_routing.toy.claims import Claim
from semantic_routing.toy.words.captions import TAGS, UNSEEN_TAGS
from semantic_routing.toy.worlds import SHAPES, WORDS, WORLDS

MEANS = {"geneval": GENEVAL_TAGS, "toy_tags": TOY_TAGS, "unseen": UNSEEN_TAGS}
"""Groups of tags whose mean is a column, if all of them are there."""


@dataclass(frozen=True, kw_only=True)
class Shapes(Benchmark):
    """Captions of the toy world; one image a prompt, ``<five digits>.png``."""

    name: ClassVar[str] = SHAPES

    @property
    def columns(self) -> Columns:
        return shapes_columns(tag for prompt in self.prompts for tag in prompt.tags)


@dataclass(frozen=True, kw_only=True)
class Words(Shapes):
    """Captions of the world of words."""

    name: ClassVar[str] = WORDS


def shapes_columns(tags: Iterable[str]) -> Columns:
    """Return ``overall``; the means of ``MEANS``; every tag in TAGS' order.

    The tags of the world of words begin with those of the toy world.
    """
    there = set(tags)
    columns = tag_columns(tag for tag in (*TAGS, *sorted(there - set(TAGS))) if tag in there)
    means = {name: tuple((tag,) for tag in group) for name, group in MEANS.items() if there.issuperset(group)}
    if there == set(TOY_TAGS):
        del means["toy_tags"]  # it is overall
    return {"overall": columns["overall"]} | means | columns


@dataclass(frozen=True)
class ShapesChecker:
    """The exact checker as a scorer; it has the claims of the captions."""

    claims: tuple[tuple[Claim, ...], ...]
    """Of every prompt."""

    usage = None

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": "exact checker of shapes", "version": __version__}

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        for task in tasks:
            with Image.open(task.path) as image:
                pixels = np.asarray(image.convert("RGB"))
            if pixels.shape[0] != pixels.shape[1]:
                reason = f"the image is {pixels.shape[1]} x {pixels.shape[0]}; the toy world's are square"
                yield task, Finding(scores={CORRECT: None}, reason=reason)
                continue
            verdict = check(pixels, self.claims[task.index])
            yield task, Finding(scores={CORRECT: float(verdict.correct)}, reason=verdict.reason)


def shapes_benchmark(seed: int, n: int, world: str = SHAPES) -> tuple[Shapes, ShapesChecker]:
    """Return ``n`` unseen captions of a world, spread evenly over its tags, and their checker, from the seed alone."""
    samples = WORLDS[world].prompts(seed, n)
    benchmark = {SHAPES: Shapes, WORDS: Words}[world](
        prompts=tuple(
            Prompt(id=f"{index:05d}", text=sample.caption, tags=(sample.tag,), metadata={"claims": repr(sample.claims)})
            for index, sample in enumerate(samples)
        )
    )
    return benchmark, ShapesChecker(tuple(sample.claims for sample in samples))


def evaluate_shapes(
    bundle: TextToImage,
    out: Path,
    *,
    n: int,
    seed: int,
    cfg: SampleConfig,
    job: Processes = ALONE,
    rescore: bool = False,
    world: str = SHAPES,
) -> dict[str, Any]:
    """Sample an image for each of ``n`` unseen captions of a world, check them exactly, and return the summary.

    ``seed`` determines the prompts, ``cfg.seed`` the noise. Images that are already in ``out`` are kept, so that a
    stopped evaluation resumes; ValueError if they belong to another model, sampler or set of prompts.
    """
    benchmark, checker = shapes_benchmark(seed, n, world)
    return evaluate_model(benchmark, bundle, out, cfg, checker, job, rescore=rescore, prompt_seed=seed)
