"""Aspect ratios: shapes of one area, each record in the nearest, each batch of one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from semantic_routing.data.buckets import assign, bucket_shapes, turns


def test_shapes_have_about_the_area_and_known_values():
    assert bucket_shapes(256, 32) == [
        (352, 192), (320, 192), (288, 224), (256, 256), (224, 288), (192, 320), (192, 352),
    ]  # fmt: skip
    for size, multiple in ((512, 64), (1024, 64), (32, 8)):
        for height, width in bucket_shapes(size, multiple):
            assert height % multiple == width % multiple == 0
            assert 0.75 < height * width / size**2 < 1.3
            assert max(height, width) <= 2 * min(height, width)
    with pytest.raises(ValueError, match="not a multiple of 48"):
        bucket_shapes(256, 48)


def test_records_go_to_the_nearest_ratio():
    shapes = bucket_shapes(256, 32)
    sizes = np.array([[100, 100], [1920, 1080], [1080, 1920], [10, 1000], [0, 0], [400, 300]], np.uint32)
    found = [shapes[bucket] for bucket in assign(sizes, shapes)]
    assert found == [(256, 256), (192, 352), (352, 192), (352, 192), (256, 256), (224, 288)]
    ratios = np.log([width / height for height, width in shapes])
    random = np.random.default_rng(0).integers(1, 1000, (200, 2))
    nearest = np.abs(np.log(random[:, :1] / random[:, 1:]) - ratios).argmin(axis=1)
    np.testing.assert_array_equal(assign(random, shapes), nearest)


def test_buckets_take_turns_by_their_size():
    given = Counter(turns([30, 0 + 10, 60]).locate(step)[0] for step in range(1000))
    assert given == {0: 300, 1: 100, 2: 600}
    millions = turns([20_000_000, 9_999_999, 1])
    assert len({millions.locate(step)[0] for step in range(2**14 + 2)}) == 3
