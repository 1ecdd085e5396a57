"""A run with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import save_checkpoint, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint of step 3."""
    save_checkpoint(tmp_path / "run", 3, *trained(), {"config": {"a": 1}})
    return tmp_path / "run"
