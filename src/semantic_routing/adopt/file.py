"""The file of a routing: ``routing.safetensors``, a few kilobytes in size, whose header describes the model it is for.

It is separate from a LoRA's file, because ``load_lora_weights`` of diffusers refuses files with other keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from semantic_routing.adopt.card import write_card
from semantic_routing.adopt.facts import Facts
from semantic_routing.checkpoint.safetensors_storage import open_tensors
from semantic_routing.common.config import from_dict
from semantic_routing.common.files import written_whole
from semantic_routing.text.quiet import first_line

FILE, CARD = "routing.safetensors", "README.md"
HEADER = "semantic_routing"
"""Key of the header in the file's metadata."""
PREFIX = "routing."
VERSION = 1
HUB_NAME = r"[\w.-]+/[\w.-]+"
FREE = ("version", "component", "base_model", "arm", "weights", "injection")
"""Facts that need not agree with the model that a routing is loaded into: what was chosen, and names."""


def save_routing(facts: Facts, state: Mapping[str, Tensor], folder: Path) -> Path:
    """Write a routing's parameters and card to a folder, and return the file; ValueError if it cannot be written."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder to write {FILE} to")
    tensors = {f"{PREFIX}{name}": x.detach().float().cpu().clone() for name, x in state.items()}
    header = json.dumps(asdict(facts), sort_keys=True)
    with written_whole(folder / FILE) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt", HEADER: header})
    write_card(folder / CARD, facts, sum(x.numel() for x in state.values()))
    return folder / FILE


def read_routing(source: str | Path) -> tuple[Facts, dict[str, Tensor]]:
    """Return header and parameters of a file, a folder or a name on the hub; ValueError if there is no routing."""
    path = find_file(source)
    try:
        with open_tensors(path) as content:
            metadata = content.metadata() or {}
            tensors = {name.removeprefix(PREFIX): content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except ValueError as error:
        raise ValueError(f"{error}: fetch or save the routing again") from error
    if not all(bool(x.isfinite().all()) for x in tensors.values()):
        raise ValueError(f"{path} holds NaN or infinity: train the routing again")
    return _facts(metadata, path), tensors


def check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError unless the tensors of a file have the names and shapes that a routing expects."""
    asked, held = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (wanted, found))
    if asked != held:
        raise ValueError(f"the routing in {source} holds tensors {held}, but its header expects {asked}")


def find_file(source: str | Path) -> Path:
    """Return the path of a routing's file, which is downloaded if it is on the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ValueError(f"{path} holds no {FILE}: give the folder that routing.save() wrote")
        return path / FILE
    if not re.fullmatch(HUB_NAME, str(source)):
        raise ValueError(f"there is no routing at {str(source)!r}: give a folder, a file or owner/name on the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), FILE))
    except (OSError, ValueError) as error:  # offline, no such repository, no such file
        raise ValueError(
            f"there is no folder {str(source)!r}, and the Hugging Face hub gives no {FILE} of that name "
            f"({first_line(error)}): check the name and the connection, or give a folder that routing.save() wrote"
        ) from error


def check_fits(facts: Facts, model: Facts, source: str | Path) -> None:
    """Raise ValueError unless a routing's header matches the model that it is loaded into."""
    for field in fields(Facts):
        wanted, found = getattr(facts, field.name), getattr(model, field.name)
        if field.name not in FREE and wanted != found:
            raise ValueError(
                f"the routing in {source} is for {field.name} {wanted!r}, but this model has {found!r}: load it into "
                f"a pipeline like {facts.base_model or facts.transformer}, or adopt this one and train it"
            )


def _facts(metadata: dict[str, str], path: Path) -> Facts:
    """Return the header of a file."""
    if HEADER not in metadata:
        raise ValueError(f"{path} is not a routing of semantic-routing: its header lacks {HEADER!r}")
    try:
        values: Any = json.loads(metadata[HEADER])
    except json.JSONDecodeError as error:
        raise ValueError(f"the header of {path} is damaged: {error}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} has format version {version!r}, but this program reads {VERSION}: update it")
    return from_dict(Facts, values, "header.")
