"""The data of a run's report: its configuration, metrics and scores, read from its folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.routers import open_router
from semantic_routing.checkpoint.load import find_checkpoint, read_state
from semantic_routing.common.files import read_json, read_json_lines
from semantic_routing.evaluation.records import MANIFEST, RECORDS, Record, read_records
from semantic_routing.evaluation.shapes import shapes_columns
from semantic_routing.evaluation.summary import summarize
from semantic_routing.model.arms import Arm
from semantic_routing.model.dit import Backbone


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that the report shows."""

    run: Path
    evaluation: Path
    config: dict[str, Any]
    """The run's resolved configuration."""
    steps: int
    """Finished training steps."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    records: list[Record]
    summary: dict[str, Any]
    manifests: tuple[dict[str, Any], dict[str, Any]]
    """Manifests of the training and of the evaluation."""
    timings: dict[str, float]
    """Seconds of each stage."""
    model: Backbone
    """The network, on the meta device except its router."""

    @property
    def arm(self) -> Arm:
        return self.model.cfg.strategy

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def images_seen(self) -> int:
        return self.steps * self.config["batch"]

    @property
    def images_per_second(self) -> float:
        """Median training speed."""
        return median(row["images_per_s"] for row in self.metrics)

    @property
    def total_seconds(self) -> float:
        return self.timings.get("total", sum(self.timings.values()))


def read_results(run: Path, evaluation: Path, timings: dict[str, float]) -> Results:
    """Read a run and its toy-world evaluation; ValueError if a file is missing, empty or damaged."""
    state = read_state(find_checkpoint(run))
    records = read_records(evaluation / RECORDS)
    metrics = read_json_lines(run / "metrics.jsonl", "the metrics of a finished run")
    if not metrics:
        raise ValueError(f"{run}/metrics.jsonl is empty; give the folder of a run that has trained")
    return Results(
        run=run,
        evaluation=evaluation,
        model=open_router(run),
        config=state["config"],
        steps=state["step"],
        metrics=metrics,
        records=records,
        summary=summarize(records, shapes_columns(tag for record in records for tag in record.tags)),
        manifests=(
            read_json(run / MANIFEST, "the manifest of a finished run"),
            read_json(evaluation / MANIFEST, "the manifest of a finished evaluation"),
        ),
        timings=timings,
    )


def numbers(r: Results) -> dict[str, Any]:
    """Return the content of metrics.json."""
    accuracy = dict(r.summary["accuracy"])
    geneval = accuracy.pop("geneval", None)
    return {
        "accuracy": accuracy,
        "geneval_mean": geneval,
        "interval": r.summary["interval"],
        "images": r.summary["n"],
        "arm": r.arm.name,
        "parameters": r.parameters,
        "steps": r.steps,
        "images_seen": r.images_seen,
        "images_per_second": r.images_per_second,
        "final_loss": float(smoothed(np.array([row["loss"] for row in r.metrics]))[-1]),
        "train_seconds": r.timings["train"],
        "total_seconds": r.total_seconds,
    }


def smoothed(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return the running mean over a twentieth of the values; the window is shorter at both ends."""
    window = np.ones(min(len(values), 2 * (len(values) // 40) + 1))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
