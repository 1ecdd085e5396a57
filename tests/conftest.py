"""What all tests share: checked annotations, a fixed seed, the reference material beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

# Before anything imports the package: every annotated shape and type is checked while tests run.
jaxtyping.install_import_hook("semantic_routing", "beartype.beartype")

# torch counts the host's cores, also where this process may use only some of them.
torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: annotations are not checked, so that the program's own messages are heard."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and golden cases: ``shared`` beside the repository, or ``$SEMROUTE_SHARED``."""
    folder = Path(os.environ.get("SEMROUTE_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set SEMROUTE_SHARED to the one that holds golden/")
    return folder
