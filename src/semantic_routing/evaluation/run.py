"""A benchmark from start to end: sample its images, or use a folder of images, and score them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from semantic_routing.common.distributed import ALONE, Processes
from semantic_routing.common.manifest import manifest
from semantic_routing.evaluation.benchmark import Benchmark, Scorer
from semantic_routing.evaluation.records import MANIFEST
from semantic_routing.evaluation.scoring import check_scorer, read_manifest, score_folder
from semantic_routing.model.override import RoutingOverride
from semantic_routing.sampling.folder import claim_folder, claimed_by_first, request, sample_missing
from semantic_routing.sampling.routing_file import overridden
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage

IMAGES = "images"
SEED_RULE = (
    "the noise of an image is a function of (sampler seed, prompt index, image index) alone; prompt i is the i-th of "
    "the prompt set"
)
ORIGIN = (
    "checkpoint",
    "weights_sha256",
    "bf16",
    "null_prompt",
    "resolution",
    "sampler",
    "seed_rule",
    "prompts",
    "prompt_seed",
    "routing",
)
"""Keys of a manifest that say how images were made."""


def evaluate_model(
    benchmark: Benchmark,
    bundle: TextToImage,
    out: Path,
    cfg: SampleConfig,
    scorer: Scorer | None,
    job: Processes = ALONE,
    *,
    rescore: bool = False,
    routing: RoutingOverride | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Sample the benchmark's images into ``out/images``, score them, and return the summary, empty without a scorer.

    ``bundle`` is what ``load`` returns, ``cfg`` the sampling settings, and ``routing`` replaces routing weights of the
    model. Results that are already in ``out`` are kept, so that a stopped evaluation resumes. Raises ValueError if they
    belong to another model, routing, sampler, set of prompts or scorer; with ``rescore`` the scores of another scorer
    are replaced. ``facts`` are added to the manifest.
    """
    with claimed_by_first(out, job):
        texts = [prompt.text for prompt in benchmark.prompts]
        wanted = request(bundle, texts, cfg, routing) if job.first else {}  # large weights take a while to hash
        earlier = read_manifest(out / MANIFEST)
        if earlier and job.first:  # other images are refused before any score goes; the manifest stays as it is
            claim_folder(out, wanted, **{name: fact for name, fact in earlier.items() if name not in wanted})
        if scorer is not None:
            check_scorer(benchmark, out, scorer.identity, rescore=rescore, job=job)
        facts |= _facts(benchmark, earlier.get("scorer") if scorer is None else scorer.identity)
        checkpoint = None if bundle.checkpoint is None else str(bundle.checkpoint)
        claim_folder(out, wanted, job, seed_rule=SEED_RULE, checkpoint=checkpoint, bf16=bundle.bf16, **facts)
        paths = {place: out / benchmark.sampled(*place) for place in benchmark.images}
        with overridden(bundle.model, routing):
            sample_missing(bundle, texts, paths, cfg, job)
        if job.first:
            benchmark.complete(out)
        job.wait()
        if scorer is None:
            return {}
        return score_folder(benchmark, out / IMAGES, out, scorer, read_manifest(out / MANIFEST), job)


def evaluate_images(
    benchmark: Benchmark,
    images: Path,
    out: Path,
    scorer: Scorer,
    job: Processes = ALONE,
    *,
    rescore: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Score a folder of images in the layout of the benchmark's official tools, and return the summary.

        benchmark = read_geneval(Path("evaluation_metadata.jsonl"))  # semantic_routing.evaluation.geneval.benchmark
        evaluate_images(benchmark, Path("images"), Path("evaluations/mine"), scorer)

    ``scorer`` has ``identity`` and ``score(tasks)`` (``benchmark.py``). Records, summary and table are written to
    ``out``. Results that are already there are kept; ValueError if they come from another scorer, unless ``rescore``.
    ``facts`` are added to the manifest.
    """
    with claimed_by_first(out, job):
        check_scorer(benchmark, out, scorer.identity, rescore=rescore, job=job)
        known = image_origin(benchmark, images) | _facts(benchmark, scorer.identity) | {"images": str(images)} | facts
        return score_folder(benchmark, images, out, scorer, manifest(**known), job)


def image_origin(benchmark: Benchmark, images: Path) -> dict[str, Any]:
    """Read how the images were made from a manifest in or beside their folder; ValueError if for other prompts."""
    for folder in (images, images.absolute().parent):
        found = read_manifest(folder / MANIFEST)
        if "sampler" in found:
            other = found.get("prompt_set")
            if other is not None and other != benchmark.prompt_set:
                raise ValueError(
                    f"{images} was sampled for other prompts of {found.get('benchmark')}, as {folder / MANIFEST} says"
                )
            return {name: found[name] for name in ORIGIN if name in found}
    return {}


def _facts(benchmark: Benchmark, identity: Any) -> dict[str, Any]:
    """Return the manifest's facts for both ways of scoring."""
    return {
        "benchmark": benchmark.name,
        "prompt_set": benchmark.prompt_set,
        "scorer": identity,
        "table": {
            "metrics": list(benchmark.metrics),
            "columns": {name: [list(group) for group in column] for name, column in benchmark.columns.items()},
            "headline": list(benchmark.headline),
        },
    }
