"""Batches: the same bits for any number of ranks and workers, from any step, whatever is damaged."""

from __future__ import annotations

import gc
import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.data.batch import Batch
from semantic_routing.data.damage import FILE, DamageLog
from semantic_routing.data.dataset import DataConfig, Dataset, open_data
from semantic_routing.data.draws import draw, posterior_noise
from semantic_routing.data.loader import Loader, prefetch
from tests.helpers.damaged import EVERY, RECORDS, TEN, write_shards

LATENT = (2, 4, 4)


@pytest.fixture(scope="module")
def rotten(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shards(tmp_path_factory.mktemp("rotten")))


@pytest.fixture(scope="module")
def data(rotten: str) -> Dataset:
    return open_data(DataConfig(paths=(rotten,), window=2), image_size=8, seed=1)


def taken(data: Dataset, first: int, steps: int, **how: int) -> list[Batch]:
    with closing(Loader(data, batch=8, noise_shape=LATENT, posterior=True, **how).batches(first)) as batches:
        return list(islice(batches, steps))


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("images", "noise", "posterior_noise", "time_uniform", "drop_uniform"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.captions, one.samples, one.skipped) == (other.captions, other.samples, other.skipped)


def test_a_batch_is_its_rows(data: Dataset):
    batch = Loader(data, batch=8, noise_shape=LATENT, posterior=True).load(30)
    rows = data.load(30, 8, range(8))
    assert batch.samples == [(0, row.epoch, row.sample) for row in rows]
    assert {epoch for _, epoch, _ in batch.samples} == {1}
    assert batch.captions == [row.caption for row in rows]
    assert batch.skipped == [row.skipped for row in rows]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(batch.images[i].numpy(), row.image)
        drawn = draw(1, row.sample, row.epoch, LATENT)
        np.testing.assert_array_equal(batch.noise[i].numpy(), drawn.noise)
        assert (batch.time_uniform[i], batch.drop_uniform[i]) == (drawn.time_uniform, drawn.drop_uniform)
        assert batch.posterior_noise is not None
        expected = posterior_noise(1, row.sample, row.epoch, LATENT)
        np.testing.assert_array_equal(batch.posterior_noise[i].numpy(), expected)
    assert Loader(data, batch=8, noise_shape=LATENT).load(0).posterior_noise is None


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_equal_parts_of_the_same_batches(data: Dataset, world: int):
    whole = taken(data, 0, 5)
    parts = [taken(data, 0, 5, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[step].noise for part in parts]), batch.noise)
        assert [caption for part in parts for caption in part[step].captions] == batch.captions
        assert [skipped for part in parts for skipped in part[step].skipped] == batch.skipped


@pytest.mark.parametrize("how", [{"ahead": 3}, {"workers": 1}, {"workers": 2, "ahead": 2}], ids=str)
def test_threads_and_workers_make_the_same_batches_from_any_step(data: Dataset, how: dict[str, int]):
    expected = [Loader(data, batch=8, noise_shape=LATENT, posterior=True).load(step) for step in range(23, 29)]
    for batch, other in zip(taken(data, 23, 6, **how), expected, strict=True):
        assert_same(batch, other)
    assert multiprocessing.active_children() == []


def test_without_workers_there_is_no_other_process(data: Dataset):
    with closing(Loader(data, batch=4, noise_shape=LATENT).batches(3)) as batches:
        next(batches)
        assert multiprocessing.active_children() == []


@pytest.fixture
def working(data: Dataset) -> Iterator[Iterator[Batch]]:
    with closing(Loader(data, batch=8, noise_shape=LATENT, workers=1).batches()) as batches:
        next(batches)
        yield batches


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(working: Iterator[Batch]):
    [worker] = [process for process in multiprocessing.active_children() if "grain" in process.name]
    worker.kill()
    worker.join(10)
    with pytest.raises(TrainingFailed, match="that reads the data was killed"):
        list(islice(working, 10))  # those that were ready are still given


def test_errors_of_workers_are_raised_here(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    rows = [{"image": f"{i}.png", "text": "x"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = open_data(DataConfig(paths=(str(tmp_path),)), image_size=8, seed=0)
    for workers in (0, 1):
        with pytest.raises(TrainingFailed, match="cannot be used, the last because: not an image"):
            taken(broken, 0, 1, workers=workers)


def test_every_damaged_record_is_counted_by_its_reason(data: Dataset, tmp_path: Path):
    ranks = [Loader(data, batch=8, noise_shape=LATENT, rank=rank, world=2) for rank in range(2)]
    logs = [DamageLog(tmp_path / FILE if rank == 0 else None, most=0.1, enough=100) for rank in range(2)]
    for step in range(RECORDS // 8):
        batches = [loader.load(step) for loader in ranks]
        for batch, log in zip(batches, logs, strict=True):
            assert batch.images.shape == (4, 8, 8, 3)
            assert (batch.images == batch.images[:, :1, :1]).all()  # only whole pictures, which are of one colour
            assert all(caption.startswith("number ") for caption in batch.captions)
            log.add(batch.skipped)
        tallies = [log.take() for log in logs]
        for log in logs:
            log.merge(tallies)
    for log in logs:
        assert log.counts() == {"rows": RECORDS} | dict.fromkeys(TEN, 1)
    listed = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert Counter(row["reason"] for row in listed) == dict.fromkeys(TEN, 1)
    numbers = {int(row["key"].split("/")[1]): row["reason"] for row in listed}
    assert numbers == {EVERY * i + EVERY // 2 + i: reason for i, reason in enumerate(TEN)}
    assert all(row["key"].startswith(row["shard"]) for row in listed)


def test_buckets_give_latents_of_their_shape(tmp_path: Path):
    from semantic_routing.data.sources.index_writer import build

    for i in range(4):
        Image.new("RGB", (32, 18)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("wide")
    build([str(tmp_path)], tmp_path / ".semroute-index", look_inside=True, workers=1)
    cfg = DataConfig(paths=(str(tmp_path),), buckets=True, bucket_multiple=4)
    batch = Loader(open_data(cfg, image_size=16, seed=0), batch=2, noise_shape=LATENT).load(0)
    assert batch.images.shape == (2, 12, 20, 3)
    assert batch.noise.shape == (2, 2, 3, 5)


@pytest.mark.parametrize("how", [{"world": 3}, {"rank": 2, "world": 2}, {"workers": -1}, {"ahead": -1}, {"world": 0}])
def test_impossible_loaders(data: Dataset, how: dict[str, int]):
    with pytest.raises(ValueError, match=r"does not divide|must be at least 0"):
        Loader(data, batch=8, noise_shape=LATENT, **how)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_works_ahead_but_not_further():
    made: list[int] = []
    third = threading.Event()

    def load(step: int) -> int:
        made.append(step)
        if step == 2:
            third.set()
        return step

    numbers = prefetch(load, ahead=2)
    assert next(numbers) == 0
    assert third.wait(10)  # 0 was asked for; 1 and 2 follow on the thread
    time.sleep(0.02)
    assert made == [0, 1, 2]
    numbers.close()


def test_prefetch_raises_what_load_raised_in_its_turn():
    def load(step: int) -> int:
        if step == 4:
            raise ValueError("picture 4 is broken")
        return step

    numbers = prefetch(load, start=2)
    assert list(islice(numbers, 2)) == [2, 3]
    with pytest.raises(ValueError, match="picture 4 is broken"):
        next(numbers)
    assert prefetch_threads() == []


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_prefetch_ends_its_thread(how: str):
    numbers = prefetch(lambda step: step)
    next(numbers)
    assert len(prefetch_threads()) == 1
    if how == "closed":
        numbers.close()
    else:
        del numbers
        gc.collect()
    assert prefetch_threads() == []


def test_prefetch_needs_room():
    with pytest.raises(ValueError, match="ahead is 0"):
        next(prefetch(lambda step: step, ahead=0))
