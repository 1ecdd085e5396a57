"""Measures every ablation of a model, paired with the unchanged model, and adds the results to a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from semantic_routing.analysis.ablation.plan import KINDS, Ablation, Kind, plan
from semantic_routing.analysis.ablation.scores import Score, accuracy
from semantic_routing.analysis.routers import TIMES, routes, routing_weights
from semantic_routing.common.files import read_json, write_text
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.evaluation.resampling import PromptSums, bootstrap
from semantic_routing.evaluation.velocity_loss import held_out_loss
from semantic_routing.flow import FIXED_TIMES
from semantic_routing.model.dit import DiT
from semantic_routing.model.override import EditedRouter, rerouted
from semantic_routing.sampling.folder import weights_sha256
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.toy.worlds import world_of
from semantic_routing.training.recipes import TOY_SAMPLING

TABLE, SETTINGS = "ablation.csv", "ablation.json"
OVERALL = "overall"
COLUMNS = ("kind", "row", "other", "tag", "n", "base", "value", "need", "low", "high")
TYPES = (str, str, str, str, int, float, float, float, float, float)
RESAMPLES = 1000
PROMPTS = {"accuracy": 110, "loss": 256}
"""Default numbers of prompts."""


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is ablated, and how its effect is measured."""

    score: Literal["auto", "accuracy", "loss"] = "auto"
    """accuracy: of sampled images, by the exact checker of a generated world; loss: the velocity loss on held-out
    images; auto is accuracy if the model was trained on a world with a checker, otherwise loss."""
    kinds: tuple[Kind, ...] = tuple(KINDS)
    """without: a layer is removed from a row; alone: a row reads only one layer; swap: two blocks exchange their
    weights."""
    n: int | None = None
    """Number of prompts, by default 110 for accuracy and 256 for the loss."""
    paths: tuple[str, ...] = ()
    """Held-out data, in the form of data.paths; by default the world or the validation data of the run."""
    times: tuple[float, ...] = FIXED_TIMES
    """Times of the loss, from 0 (noise) to 1 (data)."""
    seed: int = 0
    """Random seed of the prompts and of the loss's noise."""
    batch: int = 64
    """Images per forward pass for the loss; does not change the result."""
    sampling: SampleConfig = field(default_factory=lambda: replace(TOY_SAMPLING, steps=25))
    """Sampling settings of the images for accuracy."""

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 2:
            raise ValueError(f"ablation.n is {self.n}; an interval needs at least 2 prompts")
        if not self.kinds or self.batch < 1 or not self.times or not all(0 <= time <= 1 for time in self.times):
            raise ValueError("an ablation needs at least one kind, a batch of at least 1, and times from 0 to 1")


class Measured(NamedTuple):
    """One ablation on the prompts of one tag."""

    kind: Kind
    row: str
    other: str
    tag: str
    n: int
    base: float
    """Mean of the unchanged model."""
    value: float
    """Mean with the ablation."""
    need: float
    """How much worse it becomes: lost accuracy, or added loss."""
    low: float
    high: float


def make_score(bundle: TextToImage, cfg: AblationConfig) -> Score:
    """Return the measure that the configuration asks for; ValueError if the data for it is missing."""
    world = world_of(bundle.config, cfg.paths)
    kind = cfg.score if cfg.score != "auto" else "accuracy" if world else "loss"
    n = cfg.n or PROMPTS[kind]
    if kind == "loss":
        return held_out_loss(bundle, cfg.paths, n, cfg.seed, cfg.times, cfg.batch)
    if not world:
        raise ValueError("only images of the generated worlds are checked exactly: use --ablation.score loss")
    return accuracy(bundle, world, n, cfg.seed, cfg.sampling)


def run_ablation(bundle: TextToImage, cfg: AblationConfig, out: Path) -> tuple[Score, list[Measured]]:
    """Measure all ablations and return them with their score; ``ablation.csv`` in ``out`` grows with each.

    A stopped command resumes from there. Raises ValueError if the folder holds ablations with other settings, or if the
    model has no routing weights.
    """
    model = bundle.model
    if not isinstance(model, DiT) or not routes(model):
        raise ValueError(f"arm {model.cfg.arm!r} has no routing weights to ablate")
    todo = plan(model.cfg, routing_weights(model, TIMES), cfg.kinds)
    with claimed(out / LOCK, out):
        _claim(out, bundle, cfg)
        score = make_score(bundle, cfg)
        tags = [OVERALL, *dict.fromkeys(tag for tag in score.tags if tag)]
        found = read_table(out / TABLE, len(tags))
        write_text(out / TABLE, _lines([COLUMNS, *found]))
        done = {(row.kind, row.row, row.other) for row in found}
        missing = [ablation for ablation in todo if (ablation.kind, *ablation.names(model.cfg)) not in done]
        base = score.values() if missing else np.empty(0)
        for ablation in tqdm(missing, desc="Ablating", initial=len(todo) - len(missing), total=len(todo)):
            edit = partial(ablation.edit, depth=model.cfg.depth)
            shape = (len(model.cfg.rows), model.cfg.text_layers)
            with rerouted(model, EditedRouter(model.router, shape, edit)):
                values = score.values()
            rows = list(_compared(ablation, score, tags, base, values, ablation.names(model.cfg)))
            with (out / TABLE).open("a", encoding="utf-8") as file:
                file.write(_lines(rows))
            found += rows
    return score, found


def _compared(
    ablation: Ablation,
    score: Score,
    tags: Sequence[str],
    base: Float[np.ndarray, " N"],
    values: Float[np.ndarray, " N"],
    names: tuple[str, str],
) -> Iterator[Measured]:
    """Yield the ablation's row for each tag, with a 95 % bootstrap interval of the paired differences over prompts."""
    lost = score.better * (base - values)
    for tag in tags:
        chosen = np.array([tag in (OVERALL, own) for own in score.tags])
        low, high = interval(lost[chosen])
        was, now, need = (float(x[chosen].mean()) for x in (base, values, lost))
        yield Measured(ablation.kind, *names, tag, int(chosen.sum()), was, now, need, low, high)


def interval(differences: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean of paired differences."""
    sums = PromptSums(differences[None], np.ones((1, len(differences))))
    return bootstrap(sums, resamples=RESAMPLES, seed=0)


def read_table(path: Path, tags: int) -> list[Measured]:
    """Read the ablations of a table that have rows for all ``tags``; a line that was cut off is ignored."""
    if not path.is_file():
        return []
    by_ablation: dict[tuple[str, str, str], list[Measured]] = {}
    text = path.read_text(encoding="utf-8")
    for cells in list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))[1:]:
        if len(cells) == len(COLUMNS):
            row = Measured._make(kind(cell) for kind, cell in zip(TYPES, cells, strict=True))
            by_ablation.setdefault((row.kind, row.row, row.other), []).append(row)
    return [row for rows in by_ablation.values() if len(rows) == tags for row in rows]


def _lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _claim(out: Path, bundle: TextToImage, cfg: AblationConfig) -> None:
    """Write the settings; ValueError if the folder's table was made with others. More kinds may be added."""
    wanted: dict[str, Any] = asdict(cfg) | {"weights_sha256": weights_sha256(bundle.model)}
    del wanted["kinds"], wanted["batch"], wanted["sampling"]["batch"]
    wanted = json.loads(json.dumps(wanted))
    path = out / SETTINGS
    if path.is_file() and (out / TABLE).is_file():
        found = read_json(path, "the settings of ablations")
        other = [name for name, value in wanted.items() if not isinstance(found, dict) or found.get(name) != value]
        if other:
            raise ValueError(f"{out} holds ablations with another {', '.join(other)}; choose another --out")
    write_text(path, json.dumps(wanted, indent=2) + "\n")
