"""The velocity loss of held-out pictures, prompt by prompt.

It is the loss of training on pictures that training never saw. It tells smaller differences between models apart than
verdicts on sampled images do, because a picture's loss changes with everything that the model reads of its caption.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.common.config import from_dict
from semantic_routing.common.distributed import ALONE, Processes
from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.data.batch import collate
from semantic_routing.data.dataset import DataConfig
from semantic_routing.data.streams import Row
from semantic_routing.evaluation.records import LOSS, MANIFEST, RECORDS, SUMMARY, TABLE, Record, write_records
from semantic_routing.evaluation.scoring import read_manifest
from semantic_routing.evaluation.shapes import shapes_columns
from semantic_routing.evaluation.summary import Columns, grouped, scores_table, spread, without_nan
from semantic_routing.flow import path, velocity
from semantic_routing.model.override import RoutingOverride
from semantic_routing.model.runtime import autocast, rounded_once
from semantic_routing.sampling.folder import claimed_by_first, weights_sha256
from semantic_routing.sampling.located import located, located_data
from semantic_routing.sampling.routing_file import overridden
from semantic_routing.sampling.text_plan import TextPlan
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.text.features import TextFeatures
from semantic_routing.toy.worlds import WORLDS, world_of
from semantic_routing.training.validation import ValidationConfig, held_out

_LOG = logging.getLogger(__name__)
BENCHMARK = "loss"
KEPT_TEXTS = 2**30
"""Bytes of hidden states that are kept between calls, on the network's device."""


@dataclass
class VelocityLoss:
    """The velocity's mean squared error on pictures, averaged over fixed times.

    Pictures, noise and times are the same for every model. Captions are encoded once as long as their states fit into
    ``KEPT_TEXTS``.
    """

    bundle: TextToImage
    rows: Sequence[Row]
    tags: list[str]
    """Of every picture's caption; "" without a tag."""
    times: Sequence[float]
    batch: int = 64
    """Pictures per forward pass; does not change the result."""
    job: Processes = ALONE
    """The processes that share the batches, all on CPUs or each on its own GPU."""
    name: str = "velocity loss"
    better: int = -1

    def __post_init__(self) -> None:
        batches = [self.rows[i : i + self.batch] for i in range(0, len(self.rows), self.batch)]
        self._batches = [self._read(rows) for rows in self.job.share(batches)]
        self._texts: dict[int, TextFeatures] = {}
        self._room = KEPT_TEXTS

    def _read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, list[str]]:
        """Return latents, noise and captions of some pictures."""
        codec = self.bundle.codec
        arrays = collate(rows, codec.latent_shape(*rows[0].image.shape[:2]), posterior=codec.has_posterior)
        batch = arrays.tensors(lambda values: torch.from_numpy(values).to(self.bundle.device))
        with torch.no_grad():
            latents = codec.encode(batch.images, batch.posterior_noise)
        return latents, batch.noise, batch.captions

    def _text(self, number: int, captions: list[str]) -> TextFeatures:
        """Encode the captions of a batch, or return what is kept of an earlier call."""
        if number in self._texts:
            return self._texts[number]
        found = self.bundle.encode(captions, strict=False)
        size = sum(states.nbytes for states in (found.hidden, found.keys, found.values) if states is not None)
        if size <= self._room:
            self._texts[number] = found
            self._room -= size
        return found

    @torch.no_grad()
    def values(self) -> Float[np.ndarray, " N"]:
        model, device, found = self.bundle.model, self.bundle.device, []
        for number, (latents, noise, captions) in enumerate(self._batches):
            text, target, errors = TextPlan(model, self._text(number, captions)), velocity(latents, noise), []
            for time in self.times:
                t = torch.full((len(latents),), time, device=device)
                with autocast(device, self.bundle.bf16), rounded_once(model, self.bundle.bf16):
                    noisy = path(latents, noise, t)
                    predicted = model(noisy, t, text.at(noisy, t))
                errors.append((predicted.float() - target).square().flatten(1).double().mean(1))
            found.append(torch.stack(errors).mean(0).numpy(force=True))
        shares = zip_longest(*self.job.all_gather(found))  # the batches in order, one of each process in turn
        return np.concatenate([losses for turn in shares for losses in turn if losses is not None])


def held_out_loss(
    bundle: TextToImage,
    paths: Sequence[str],
    n: int,
    seed: int,
    times: Sequence[float],
    batch: int,
    job: Processes = ALONE,
) -> VelocityLoss:
    """Return the velocity loss on ``n`` pictures of a world, of ``paths``, or of the run's validation data.

    Captions are chosen as in training. Where there are fewer pictures, the loss is of all of them. Raises ValueError if
    there are no held-out pictures.
    """
    if world := world_of(bundle.config, paths):
        samples = WORLDS[world].prompts(seed, n)
        rows = [
            Row(replace(s, size=bundle.image_size).image, s.caption, seed, 0, place) for place, s in enumerate(samples)
        ]
        return VelocityLoss(bundle, rows, [sample.tag for sample in samples], times, batch, job)
    theirs = bundle.config.get("validation", {}).get("paths", ())
    own = tuple(paths) or tuple(located(path, bundle.begun) for path in theirs)
    if not own:
        raise ValueError(
            "the loss needs images that were not used in training: give them as --paths, to "
            "semroute analyze as --ablation.paths"
        )
    data = located_data(from_dict(DataConfig, bundle.config.get("data", {}), "data."), bundle.begun)
    read = held_out(ValidationConfig(paths=own, samples=n, seed=seed), data, bundle.image_size)
    rows = list(takewhile(lambda row: row.epoch == 0, map(read, range(n))))  # each picture once
    if len(rows) < n:
        _LOG.warning("there are only %d held-out pictures, so the loss is of these and not of %d", len(rows), n)
    return VelocityLoss(bundle, rows, [""] * len(rows), times, batch, job)


def evaluate_loss(
    bundle: TextToImage,
    out: Path,
    *,
    n: int,
    times: Sequence[float],
    paths: Sequence[str] = (),
    seed: int = 0,
    batch: int = 64,
    routing: RoutingOverride | None = None,
    job: Processes = ALONE,
) -> dict[str, Any]:
    """Measure the loss on ``n`` held-out pictures, write records, summary and table to ``out``, return the summary.

    ``seed`` determines the captions, pictures and noise; ``routing`` replaces routing weights of the model. The
    processes of ``job`` share the pictures; the first writes, and only it returns a summary. Raises ValueError if there
    are no held-out pictures, or if ``out`` holds another evaluation.
    """
    with claimed_by_first(out, job):
        measure = held_out_loss(bundle, paths, n, seed, times, batch, job)
        columns = {name: column for name, column in shapes_columns(measure.tags).items() if name}
        facts = _facts(measure, columns, seed) | {
            "weights_sha256": weights_sha256(bundle.model),
            "routing": None if routing is None else routing.to_json(),
        }
        earlier = read_manifest(out / MANIFEST)
        for name in ("benchmark", "prompt_set", "scorer", "weights_sha256", "routing"):
            if earlier and earlier.get(name) != facts[name]:
                raise ValueError(f"{out} holds an evaluation with another {name}; choose another --out")
        with overridden(bundle.model, routing):
            losses = measure.values()
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise ValueError(f"the network gives no number for picture {first}, {measure.rows[first].caption!r}")
        checkpoint = None if bundle.checkpoint is None else str(bundle.checkpoint)
        about = manifest(checkpoint=checkpoint, bf16=bundle.bf16, **facts)
        return _written(out, measure, losses, columns, about) if job.first else {}


def _written(
    out: Path, measure: VelocityLoss, losses: Float[np.ndarray, " N"], columns: Columns, about: dict[str, Any]
) -> dict[str, Any]:
    """Write the results and return the summary."""
    records = [
        Record(
            prompt=i, id=f"{i:05d}", image=0, caption=row.caption, tags=(tag,), file="", scores={LOSS: loss}, reason=""
        )
        for i, (row, tag, loss) in enumerate(zip(measure.rows, measure.tags, losses.tolist(), strict=True))
    ]  # fmt: skip
    scores = {name: spread(grouped(records, column, LOSS)[0]) for name, column in columns.items() if len(column) == 1}
    summary: dict[str, Any] = without_nan({"scores": {LOSS: scores}, "gaps": {}})
    write_text(out / MANIFEST, json.dumps(about, indent=2) + "\n")
    write_records(out / RECORDS, records)
    write_text(out / TABLE, scores_table(summary))
    write_text(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def _facts(measure: VelocityLoss, columns: Columns, seed: int) -> dict[str, Any]:
    """Return what a manifest must say so that evaluations can be compared."""
    rows = [
        (row.caption, tag, sha256(row.image.tobytes()).hexdigest())
        for row, tag in zip(measure.rows, measure.tags, strict=True)
    ]
    return {
        "benchmark": BENCHMARK,
        "prompt_set": {"n": len(rows), "sha256": sha256(json.dumps(rows).encode()).hexdigest()},
        "scorer": {"scorer": measure.name, "times": [*measure.times], "seed": seed},
        "table": {
            "metrics": [LOSS],
            "columns": {name: [list(group) for group in column] for name, column in columns.items()},
            "headline": [LOSS, "overall"],
        },
    }
