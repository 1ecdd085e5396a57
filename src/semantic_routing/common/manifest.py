"""The manifest beside every result: what was run, with which code and libraries, on what machine."""

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

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "diffusers", "triton")


def manifest(**facts: Any) -> dict[str, Any]:
    """Command, commit, versions and hardware of this process, and the given facts (configuration, seeds ...)."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions(),
        "hardware": hardware(),
    } | facts


def hardware() -> dict[str, Any]:
    """Processor, threads and, where there is one, the GPU."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Versions of this program, of Python and of the libraries that decide numbers."""
    found = {"semantic-routing": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of the checkout that the package runs from, marked where it was changed; None if installed."""
    here = Path(__file__).resolve()
    if not _git(here.parent, "ls-files", here.name):
        return None  # not of this repository, as where an environment lies inside of one
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path, *args: str) -> str:
    """What git says about the folder; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
