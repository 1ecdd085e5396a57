"""The manifest beside every result: command, commit, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from semantic_routing import __version__
from semantic_routing.common.device import processor

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "diffusers", "triton")


def manifest(**facts: Any) -> dict[str, Any]:
    """Return command, commit, versions and hardware of this process, and the given facts (configuration, seeds ...)."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions(),
        "hardware": hardware(),
    } | facts


def hardware() -> dict[str, Any]:
    """Return the processor, the number of threads and, if there is one, the GPU."""
    names = [line.partition(":")[2].strip() for line in processor() if line.startswith("model name")]
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Return the versions of this program, of Python and of the libraries that affect numbers."""
    found = {"semantic-routing": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that the package runs from, marked if changed; None if it is installed."""
    here = Path(__file__).resolve()
    if not _git(here.parent, "ls-files", here.name):
        return None  # installed in an environment inside another repository
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path, *args: str) -> str:
    """Return git's output about the folder; empty without git or a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
