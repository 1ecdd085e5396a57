"""One name or path, one source of training samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantic_routing.data.folder import ImageFolder
from semantic_routing.data.order import load_batch
from semantic_routing.data.shapes import sample, split_of
from semantic_routing.data.sources import ShapesSource, open_source


def test_the_toy_world_is_the_default():
    for data in (None, "shapes"):
        source = open_source(data, size=16, seed=3)
        assert isinstance(source, ShapesSource)
        loaded = source.load(2**39, np.random.default_rng(0))
        drawn = sample(3, 2**39, size=16)
        assert loaded.caption == drawn.caption
        np.testing.assert_array_equal(loaded.image, drawn.image)


def test_batches_of_the_toy_world_are_of_the_training_split():
    batch = load_batch(open_source(None, size=32, seed=0), 0, 0, 16, (3, 32, 32))
    assert batch.images.shape == (16, 32, 32, 3)
    assert len(set(batch.samples)) == 16
    assert {split_of(caption) for caption in batch.captions} == {"train"}


def test_anything_else_is_a_path(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": "a.png", "text": "black"}))
    source = open_source(str(tmp_path), size=4, seed=0)
    assert isinstance(source, ImageFolder)
    assert source.load(0, np.random.default_rng(0)).image.shape == (4, 4, 3)
    with pytest.raises(ValueError, match="'shape' does not exist"):
        open_source("shape", size=4, seed=0)


def test_captions_to_watch_by_are_never_trained_on():
    captions = ShapesSource(0).captions(8)
    assert len(captions) == 8
    assert {split_of(caption) for caption in captions} == {"eval"}
