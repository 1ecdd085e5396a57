"""Drawing and laying out scenes."""

import numpy as np
import pytest

from semantic_routing.toy.scenes import (
    BACKGROUNDS,
    CANVAS,
    CELL,
    COLORS,
    SHAPES,
    Dice,
    Object,
    Scene,
    arrange,
    changed,
    render,
    scatter,
)

AREAS = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}


def dice(seed: int) -> Dice:
    return Dice(np.random.default_rng(seed))


def assert_clear(scene: Scene) -> None:
    """Assert that objects are inside the picture, on the grid, and at least a pixel apart."""
    boxes = [thing.box for thing in scene.objects]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert min(left, top) >= 0
        assert max(right, bottom) <= CANVAS - 1
        assert left % CELL == top % CELL == 0
        for other in boxes[:i]:
            gaps = left - other[2], other[0] - right, top - other[3], other[1] - bottom
            assert max(gaps) >= 1


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area_inside_its_box(shape, size):
    scale = size // CANVAS
    image = render(Scene("black", (Object(shape, "red", "large", 10.0, 17.0, 14),)), size)
    assert image.shape == (size, size, 3)
    assert image.flags.writeable  # torch.from_numpy warns otherwise
    low, high = BACKGROUNDS["black"][0], COLORS["red"][0]
    covered = (image[..., 0].astype(float) - low) / (high - low)
    assert covered.sum() / (14 * scale) ** 2 == pytest.approx(AREAS[shape], abs=0.04)
    outside = covered.copy()
    outside[10 * scale : 24 * scale, 3 * scale : 17 * scale] = 0
    assert np.all(outside == 0)
    assert tuple(image[17 * scale, 10 * scale]) == COLORS["red"]


def test_backgrounds_and_colors_are_far_apart():
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=-1) + 1e3 * np.eye(len(palette))
    assert distances.min() > 120


def test_scatter_keeps_clear_and_keeps_the_order():
    extents = (7, 15, 7, 7)
    for seed in range(100):
        placed = scatter([Object("circle", "red", "", 0.0, 0.0, extent) for extent in extents], dice(seed))
        assert tuple(thing.extent for thing in placed) == extents
        assert_clear(Scene("black", placed))


@pytest.mark.parametrize("where", ["left", "right", "above", "below"])
def test_arrange_puts_the_first_where_it_was_asked(where):
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[where]
    for seed in range(100):
        first, second = (Object("circle", "red", "", 0.0, 0.0, extent) for extent in (15, 7))
        first, second = arrange(first, where, second, dice(seed))
        offset = np.array([first.x - second.x, first.y - second.y])
        assert sign * offset[axis] >= 11 + 1
        assert abs(offset[1 - axis]) <= abs(offset[axis]) / 2
        assert_clear(Scene("black", (first, second)))


def test_changes_keep_clear_and_come_in_every_sort():
    scene = Scene(
        "gray",
        (Object("circle", "red", "small", 3.5, 11.5, 7), Object("cross", "blue", "large", 23.5, 23.5, 15)),
    )
    draw = dice(0)
    results = [result for result in (changed(scene, draw) for _ in range(300)) if result is not None]
    for result in results:
        assert_clear(result)
    assert {len(result.objects) for result in results} == {1, 2, 3}
    assert {result.background for result in results} == set(BACKGROUNDS)
    places = {(result.objects[0].x, result.objects[0].y) for result in results}
    assert places >= {(27.5, 11.5), (3.5, 19.5), (11.5, 3.5)}  # mirrored left-right, up-down, axes swapped


def test_dice_cover_their_range():
    draw = dice(0)
    assert {draw.between(2, 4) for _ in range(100)} == {2, 3, 4}
    pairs = {draw.pick_two("abc") for _ in range(200)}
    assert pairs == {(a, b) for a in "abc" for b in "abc" if a != b}
    counts = [draw.weighted({"x": 3.0, "y": 1.0}) for _ in range(2000)]
    assert counts.count("x") / 2000 == pytest.approx(0.75, abs=0.04)
