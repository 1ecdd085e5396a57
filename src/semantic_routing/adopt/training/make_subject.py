"""The subject of a pipeline, by the family of its transformer."""

from __future__ import annotations

from typing import Any

import torch

from semantic_routing.adopt.families import find_family
from semantic_routing.adopt.training.config import KeepConfig
from semantic_routing.adopt.training.own_subject import OwnSubject
from semantic_routing.adopt.training.subject import Subject
from semantic_routing.adopt.training.subjects import SUBJECTS


def make_subject(pipe: Any, device: torch.device, precision: str = "auto", keep: KeepConfig | None = None) -> Subject:
    """Return a pipeline as a subject; raise ValueError for a family that cannot be trained from the command line."""
    keep = keep or KeepConfig()
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise ValueError(f"this {type(pipe).__name__} has no transformer: load the pipeline with it")
    name = find_family(transformer).name
    if name == "semantic-routing":
        return OwnSubject(pipe, device, precision, keep)
    if name not in SUBJECTS:
        known = ", ".join(["semantic-routing", *SUBJECTS])
        raise ValueError(
            f"semroute adopt trains and samples pipelines of the families {known}, but this one is of {name}: call "
            "adopt(pipe) in a training script of that family"
        )
    return SUBJECTS[name](pipe, device, keep)
