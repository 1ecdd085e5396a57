"""Quiet pipelines."""

from __future__ import annotations

import diffusers
import pytest


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


from tests.interop.conftest import make_bundle  # noqa: E402, F401
