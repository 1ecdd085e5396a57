"""What a run is trained on, and its rows by step and number in the batch."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semantic_routing.common.config import from_dict, to_dict
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.draws import stream_seed
from semantic_routing.data.order import Mixture, locate
from semantic_routing.toy.captions import sample, split_of


def folder(path: Path, count: int, size: tuple[int, int] = (8, 8)) -> str:
    """A folder of pictures of one colour each, with a manifest."""
    path.mkdir()
    for i in range(count):
        Image.new("RGB", size, (i, 0, 0)).save(path / f"{i}.png")
    rows = [{"image": f"{i}.png", "text": f"{path.name} {i}"} for i in range(count)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def captions(cfg: DataConfig, steps: int, batch: int, seed: int = 0) -> list[str]:
    data = open_data(cfg, image_size=8, seed=seed)
    return [row.caption for step in range(steps) for row in data.load(step, batch, range(batch))]


def test_the_toy_world_is_the_default():
    data = open_data(DataConfig(), image_size=32, seed=3)
    for number, row in enumerate(data.load(5, 16, range(16))):
        assert (row.stream, (row.epoch, row.sample)) == (0, locate(3, 80 + number, 2**40))
        drawn = sample(3, row.sample, size=32)
        assert (row.caption, split_of(row.caption)) == (drawn.caption, "train")
        np.testing.assert_array_equal(row.image, drawn.image)


def test_a_limited_world_has_the_same_captions_for_every_seed_and_endless_pictures():
    cfg = DataConfig(paths=("shapes",), captions=12)
    rows = {}
    for seed in (0, 1):
        data = pickle.loads(pickle.dumps(open_data(cfg, image_size=32, seed=seed)))  # as workers get it
        rows[seed] = data.load(2, 96, range(96))
        assert {row.caption for row in rows[seed]} == {sample(0, index).caption for index in range(12)}
        assert {split_of(row.caption) for row in rows[seed]} == {"train"}
        again = open_data(cfg, image_size=32, seed=seed).load(2, 96, range(40, 50))
        assert [row.image.tobytes() for row in again] == [row.image.tobytes() for row in rows[seed][40:50]]
    for mine in rows.values():
        assert len({row.image.tobytes() for row in mine}) > 60  # some captions leave little open
    assert [row.image.tobytes() for row in rows[0]] != [row.image.tobytes() for row in rows[1]]


def test_captions_to_watch_by_are_never_trained_on():
    data = open_data(DataConfig(), image_size=32, seed=0)
    assert {split_of(caption) for caption in data.captions(8)} == {"eval"}
    assert len(data.captions(8)) == 8


def test_without_weights_all_records_come_once_an_epoch(tmp_path: Path):
    paths = (folder(tmp_path / "a", 3), folder(tmp_path / "b", 9))
    seen = captions(DataConfig(paths=paths), 4, 6)
    everything = {f"a {i}" for i in range(3)} | {f"b {i}" for i in range(9)}
    assert set(seen[:12]) == set(seen[12:]) == everything


def test_with_weights_each_source_has_a_stream_of_its_own(tmp_path: Path):
    paths = (folder(tmp_path / "a", 3), folder(tmp_path / "b", 9), "shapes")
    data = open_data(DataConfig(paths=paths, weights=(2.0, 1.0, 1.0)), image_size=8, seed=7)
    loaded = [row for step in range(6) for row in data.load(step, 6, range(6))]
    mixture = Mixture((2.0, 1.0, 1.0))
    for position, row in enumerate(loaded):
        source, place = mixture.locate(position)
        assert row.stream == source
        assert row.seed == stream_seed(7, source)
        assert row.caption == data.streams[source].load(place).caption
    assert Counter(row.caption for row in loaded if row.stream == 0) == {f"a {i}": 6 for i in range(3)}
    assert {row.caption for row in loaded if row.stream == 1} == {f"b {i}" for i in range(9)}
    watched = data.captions(9)
    assert [caption[:2] for caption in watched[::3]] == ["a "] * 3
    assert len(watched) == 9


def test_any_part_of_a_batch_is_the_same_as_in_the_whole():
    data = open_data(DataConfig(), image_size=16, seed=0)
    whole = data.load(3, 8, range(8))
    parts = data.load(3, 8, range(4)) + data.load(3, 8, range(4, 8))
    assert [row.sample for row in whole] == [row.sample for row in parts]
    assert [row.sample for step in (6, 7) for row in data.load(step, 4, range(4))] == [row.sample for row in whole]
    for step, batch, rows in ((-1, 8, range(8)), (0, 0, range(0)), (0, 4, range(2, 5))):
        with pytest.raises(ValueError, match="expected some of a batch"):
            data.load(step, batch, rows)


def test_sidecar_captions_go_before_the_own_and_can_be_mixed(tmp_path: Path):
    path = folder(tmp_path / "a", 4)
    rows = [{"key": f"{i}.png", "caption": f"dense {i}"} for i in range(3)]
    (tmp_path / "dense.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sidecar = str(tmp_path / "dense.jsonl")
    assert set(captions(DataConfig(paths=(path,), sidecar=sidecar), 1, 4)) == {"dense 0", "dense 1", "dense 2", "a 3"}
    mixed = DataConfig(paths=(path,), sidecar=sidecar, caption_keys=("text", "recaption"), caption_weights=(0.25, 0.75))
    seen = Counter(caption.split()[0] for caption in captions(mixed, 100, 4))
    assert abs(seen["dense"] - 225) < 4 * np.sqrt(300 * 0.25 * 0.75)


def test_captions_of_a_sidecar_are_of_their_own_source(tmp_path: Path):
    paths = tuple(folder(tmp_path / name, 4) for name in ("a", "b"))
    sidecar = tmp_path / "dense.jsonl"
    rows = [{"key": f"{name}::{i}.png", "caption": f"dense {name} {i}"} for name in "ab" for i in range(4)]
    sidecar.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for weights in ((), (0.5, 0.5)):
        data = open_data(DataConfig(paths=paths, weights=weights, sidecar=str(sidecar)), image_size=8, seed=0)
        assert set(data.captions(8)) == {row["caption"] for row in rows}
        plain = DataConfig(paths=paths, weights=weights, sidecar=str(tmp_path / "plain.jsonl"))
        Path(plain.sidecar).write_text(json.dumps({"key": "2.png", "caption": "dense"}) + "\n")
        with pytest.raises(ValueError, match=r"a and .*b both have the key '2.png', so .* does not say whose caption"):
            open_data(plain, image_size=8, seed=0)


def test_a_batch_with_buckets_is_of_one_shape(tmp_path: Path):
    from semantic_routing.data.sources.index_writer import build

    paths = tuple(folder(tmp_path / name, 6, size) for name, size in (("wide", (32, 18)), ("tall", (18, 32))))
    for path in paths:
        build([path], Path(path) / ".semroute-index", look_inside=True, workers=1)
    cfg = DataConfig(paths=paths, buckets=True, bucket_multiple=4)
    data = open_data(cfg, image_size=16, seed=0)
    batches = [data.load(step, 3, range(3)) for step in range(4)]
    names = [{(row.caption.split()[0], row.image.shape[:2]) for row in batch} for batch in batches]
    assert all(len(batch) == 1 for batch in names)
    assert Counter(next(iter(batch)) for batch in names) == {("wide", (12, 20)): 2, ("tall", (20, 12)): 2}
    assert len({row.caption for batch in batches for row in batch}) == 12


def test_configurations_survive_json():
    cfg = DataConfig(paths=("a", "b"), weights=(0.5, 0.5), caption_keys=("txt",), flip=True)
    assert from_dict(DataConfig, to_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"paths": ()}, "paths is empty"),
        ({"paths": ("a", "b"), "weights": (1.0,)}, "1 weights for 2 paths"),
        ({"paths": ("shapes", "b")}, "unlimited"),
        ({"buckets": True}, "is square"),
        ({"max_damaged": 1.5}, "must be from 0 to 1"),
        ({"window": 0}, "window is 0"),
        ({"captions": -1}, "captions is -1"),
        ({"paths": ("a",), "captions": 5}, "leave it out for your own data"),
        ({"workers": -1}, "workers is -1"),
        ({"max_aspect": 0.5}, "max_aspect"),
        ({"caption_weights": (1.0,)}, "1 caption weights for 0"),
        ({"caption_keys": ("recaption",)}, "give data.sidecar"),
        ({"caption_keys": ("txt",), "sidecar": "s.jsonl"}, 'add "recaption"'),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)


def test_data_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="'shape' does not exist"):
        open_data(DataConfig(paths=("shape",)), image_size=4, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        open_data(DataConfig(), image_size=0, seed=0)
