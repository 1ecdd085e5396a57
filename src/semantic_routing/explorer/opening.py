"""Opens what ``semroute explore`` is given: runs, pipelines, and pipelines with an adopted routing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from semantic_routing.adopt.edits import NO_EDITS, RoutingEdits, read_edits
from semantic_routing.adopt.file import FILE, find_file
from semantic_routing.checkpoint.load import checkpoints, open_checkpoint
from semantic_routing.common.files import read_json
from semantic_routing.explorer.models import AdoptedModel, Model, OwnModel
from semantic_routing.interop.open import PIPELINE, open_model
from semantic_routing.sampling.located import FOLDER, KEY, located
from semantic_routing.sampling.routing_file import read_override

ROUTING_ENDING = ".json"
"""Ending of files of edited weights, which tells them from routings of adopted pipelines."""


@dataclass(frozen=True)
class Opened:
    """A model and the edits that the page begins with."""

    model: Model
    edits: RoutingEdits = NO_EDITS


def open_for_page(path: Path, device: torch.device, routing: str | None = None, edits: Path | None = None) -> Opened:
    """Open a run, a checkpoint, a pipeline, or the folder of semroute adopt train; ValueError for anything else.

    ``routing`` is a JSON file of edited weights for a model of this program, or the folder or file of a routing for a
    pipeline; ``edits`` is a JSON file of edits of an adopted routing.
    """
    weights = routing is not None and routing.endswith(ROUTING_ENDING)
    if routing is not None and not weights:
        return _adopted(str(path), find_file(routing), device, edits)
    if (path / FILE).is_file():  # what semroute adopt train wrote
        if weights:
            raise ValueError(f"{path} is an adopted routing: give its edits as --edits {routing}")
        pipeline = _config(path).get("pipeline")
        if not pipeline:
            raise ValueError(
                f"{path} does not say which pipeline it is for: semroute explore PIPELINE --routing {path}"
            )
        begun = open_checkpoint(path)[1].get(KEY, {}).get(FOLDER) if checkpoints(path) else None
        return _adopted(located(pipeline, begun), path / FILE, device, edits)
    if (path / PIPELINE).is_file() and not _is_own(path):
        raise ValueError(
            f"{path} is a pipeline of another program: give its routing, too, as semroute explore {path} --routing DIR"
        )
    if edits is not None:
        raise ValueError(f"--edits is for adopted routings: give the edited weights of {path} as --routing {edits}")
    model = OwnModel(str(path), open_model(path, device))
    if routing is None:
        return Opened(model)
    return Opened(model, RoutingEdits(override=read_override(Path(routing), model.bundle.model.cfg)))


def _adopted(pipeline: str, file: Path, device: torch.device, edits: Path | None) -> Opened:
    from semantic_routing.adopt.training.make_subject import make_subject
    from semantic_routing.adopt.training.open_pipeline import load_results, open_pipe

    begun = NO_EDITS if edits is None else read_edits(edits, file)
    pipe = open_pipe(pipeline, device)
    subject = make_subject(pipe, device)
    routing, folder = load_results(pipe, file), file.parent
    return Opened(AdoptedModel(str(folder), pipeline, subject, routing, _config(folder)), begun)


def _config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run that wrote a routing; empty if it was saved by a program."""
    file = folder / "config.json"
    found = read_json(file, "a run's configuration") if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _is_own(path: Path) -> bool:
    from semantic_routing.adopt.training.open_pipeline import OWN_CLASS

    return OWN_CLASS in (path / PIPELINE).read_text(encoding="utf-8")
