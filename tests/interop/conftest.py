"""Fixtures of the tests of pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import diffusers
import pytest

from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from tests.helpers.pipelines import MakeBundle, quiet, random_bundle


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def make_bundle(tiny_encoder: Path) -> MakeBundle:
    """(arm, latent=..., layers=..., **sizes) -> a model with random weights, a text encoder and a codec."""

    return partial(random_bundle, tiny_encoder)


@pytest.fixture
def pipe(make_bundle: MakeBundle) -> SemanticRoutingPipeline:
    return quiet(make_pipeline(make_bundle()))
