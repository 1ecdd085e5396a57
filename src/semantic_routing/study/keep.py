"""What a study stores of a finished run, in a few kilobytes: its verdicts, losses, routing weights and
trajectory's lead.

The tables are made only from these files, so a study can continue after its runs and images have been deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.routers import TIMES, open_router, routing_weights
from semantic_routing.analysis.trajectory import LEAD
from semantic_routing.common.files import read_json, write_text, written_whole
from semantic_routing.common.manifest import manifest
from semantic_routing.evaluation.records import CORRECT, LOSS, RECORDS, Record, read_records
from semantic_routing.model.arms import ARMS
from semantic_routing.study.plan import (
    CALIBRATED,
    Job,
    StudyArguments,
    evaluation_folder,
    loss_folder,
    trajectory_folder,
)

MARKS = {"1": 1.0, "0": 0.0, "?": None}
"""Verdicts on images, one character each: right, wrong, and none because there is no image."""

NOMINAL = "nominal"


def kept_file(args: StudyArguments, job: Job) -> Path:
    """Return the file of a finished run."""
    return args.out / "kept" / f"{job.name}.json"


def keep(args: StudyArguments, job: Job) -> None:
    """Store a finished run's verdicts under every clock and its losses, and if it has any, its weights and its lead."""
    records = {clock: read_records(evaluation_folder(args, job, clock) / RECORDS) for clock in ("", *job.clocks)}
    weights = None
    if ARMS[job.arm].has_weights:
        weights = routing_weights(open_router(args.out / "runs" / job.name), TIMES)
    lead = None
    if CALIBRATED in job.clocks:
        (measured,) = read_json(trajectory_folder(args, job) / LEAD, "leads of a trajectory")
        lead = {"mean": measured["lead"], "interval": measured["interval"]}
    losses = loss_folder(args, job) / RECORDS
    found = [float(record.scores[LOSS] or 0) for record in read_records(losses)] if losses.is_file() else None
    write_kept(args, job, records, weights, lead, found)


def write_kept(
    args: StudyArguments,
    job: Job,
    records: Mapping[str, Sequence[Record]],
    weights: Float[np.ndarray, "T K L"] | None,
    lead: Mapping[str, Any] | None = None,
    losses: Sequence[float] | None = None,
) -> None:
    """Write what is stored of a run.

    That is its records by clock, "" for the nominal one; its weights at ``TIMES``; by how much the sampling of a
    calibrated run is ahead of the nominal time, in the mean with the interval over images; and the velocity loss of
    each prompt's own picture.
    """
    path = kept_file(args, job)
    facts: dict[str, Any] = {
        "manifest": manifest(run=job.name, steps=job.config.steps, seed=job.config.seed, prompts=args.n),
        "prompts": {record.id: record.tag for record in records[""]},
        "correct": {clock or NOMINAL: "".join(map(_mark, found)) for clock, found in records.items()},
    }
    if losses is not None:
        facts[LOSS] = [round(loss, 7) for loss in losses]
    if lead is not None:
        facts["lead"] = lead
    if weights is not None:
        with written_whole(path.with_suffix(".npz")) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, times=np.array(TIMES), weights=weights)
    write_text(path, json.dumps(facts) + "\n")  # last: a run with this file is finished


def kept_records(args: StudyArguments, job: Job, clock: str = "") -> list[Record]:
    """Return the records of a finished run, with only their prompts, tags, verdicts and, if measured, losses."""
    facts = _facts(args, job)
    losses = facts.get(LOSS)
    verdicts = zip(facts["prompts"].items(), facts["correct"][clock or NOMINAL], strict=True)
    return [
        Record(
            prompt=i, id=name, image=0, caption="", tags=(tag,), file="", reason="",
            scores={CORRECT: MARKS[mark]} | ({} if losses is None else {LOSS: losses[i]}),
        )
        for i, ((name, tag), mark) in enumerate(verdicts)
    ]  # fmt: skip


def is_kept(args: StudyArguments, job: Job) -> bool:
    """Return whether a run is finished and was scored under every clock."""
    scored = _facts(args, job)["correct"] if kept_file(args, job).is_file() else {}
    return scored.keys() >= {clock or NOMINAL for clock in ("", *job.clocks)}


def kept_prompts(args: StudyArguments, job: Job) -> int | None:
    """Return the number of prompts that a run was scored on; None if it is not finished."""
    return len(_facts(args, job)["prompts"]) if kept_file(args, job).is_file() else None


def _facts(args: StudyArguments, job: Job) -> dict[str, Any]:
    return read_json(kept_file(args, job), "verdicts of a run")


def kept_weights(args: StudyArguments, job: Job) -> Float[np.ndarray, "T K L"] | None:
    """Return the routing weights of a finished run at the times ``TIMES``; None if its arm has none."""
    path = kept_file(args, job).with_suffix(".npz")
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return file["weights"]


def kept_lead(args: StudyArguments, job: Job) -> tuple[float, tuple[float, float]] | None:
    """Return a run's mean lead and its interval over images; None if it was not measured."""
    lead = _facts(args, job).get("lead")
    return lead and (lead["mean"], tuple(lead["interval"]))


def _mark(record: Record) -> str:
    return next(mark for mark, score in MARKS.items() if score == record.scores[CORRECT])
