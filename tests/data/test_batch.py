"""Batch: collated from rows, converted to tensors and split into microbatches field by field."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

from semantic_routing.data.batch import Batch, collate
from semantic_routing.data.damage import Skipped
from semantic_routing.data.draws import draw, posterior_noise
from semantic_routing.data.streams import Row

LATENT = (2, 3, 4)
SKIPPED = Skipped("data", "0.tar", "0.tar/1", "truncated", "why")


def row(number: int) -> Row:
    image = np.full((6, 8, 3), number, np.uint8)
    skipped = (SKIPPED,) * (number % 2)
    return Row(image, f"caption {number}", 7, 3, number, skipped=skipped, stream=number % 3)


def make(count: int, posterior: bool = True) -> Batch[np.ndarray]:
    return collate([row(i) for i in range(count)], LATENT, posterior=posterior)


def test_rows_are_collated_with_their_draws() -> None:
    batch = make(5)
    assert batch.captions == [f"caption {i}" for i in range(5)]
    assert batch.samples == [(0, 3, 0), (1, 3, 1), (2, 3, 2), (0, 3, 3), (1, 3, 4)]
    assert batch.skipped == [(), (SKIPPED,), (), (SKIPPED,), ()]
    for i in range(5):
        expected = draw(7, i, 3, LATENT)
        assert (batch.images[i] == i).all()
        np.testing.assert_array_equal(batch.noise[i], expected.noise)
        np.testing.assert_array_equal(batch.posterior_noise[i], posterior_noise(7, i, 3, LATENT))
        assert (batch.time_uniform[i], batch.drop_uniform[i]) == (expected.time_uniform, expected.drop_uniform)
    assert batch.time_uniform.dtype == batch.drop_uniform.dtype == np.float32


@pytest.mark.parametrize("posterior", [True, False])
def test_arrays_become_tensors_and_nothing_else_changes(posterior: bool) -> None:
    arrays = make(3, posterior)
    tensors = arrays.tensors(torch.from_numpy)
    for field in fields(Batch):
        before, after = getattr(arrays, field.name), getattr(tensors, field.name)
        if isinstance(before, np.ndarray):
            assert isinstance(after, torch.Tensor)
            np.testing.assert_array_equal(after.numpy(), before)
        else:
            assert after == before
    assert (tensors.posterior_noise is None) != posterior


@pytest.mark.parametrize("posterior", [True, False])
def test_microbatches_have_each_row_once_in_every_field(posterior: bool) -> None:
    batch = make(6, posterior)
    parts = batch.split(3)
    assert [len(part.captions) for part in parts] == [2, 2, 2]
    for i, part in enumerate(parts):
        for field in fields(Batch):
            values, whole = getattr(part, field.name), getattr(batch, field.name)
            expected = None if whole is None else whole[2 * i : 2 * i + 2]
            assert np.array_equal(values, expected) if isinstance(whole, np.ndarray) else values == expected


def test_worker_processes_import_no_torch() -> None:
    code = "import sys, semantic_routing.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
