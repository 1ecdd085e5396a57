"""Further pictures of a caption: true to it, different from each other, and free where it says nothing."""

import numpy as np
import pytest

from semantic_routing.toy.captions import Sample
from semantic_routing.toy.checker import check
from semantic_routing.toy.claims import Exists, Kind
from semantic_routing.toy.redraw import redrawn
from semantic_routing.toy.scenes import BACKGROUNDS, COLORS, SIZES, Dice, Object, Scene
from semantic_routing.toy.worlds import WORLDS


def dice(seed: int) -> Dice:
    return Dice(np.random.default_rng(seed))


@pytest.mark.parametrize("count", [40, pytest.param(150, marks=pytest.mark.stress)])
@pytest.mark.parametrize("world", WORLDS)
def test_the_claims_hold_in_the_scene_and_in_its_pixels(world: str, count: int) -> None:
    for index in range(count):
        drawn = redrawn(WORLDS[world].sample(0, index), dice(index))
        assert [claim.fault(drawn.scene.objects, drawn.scene.background) for claim in drawn.claims] == [None] * len(
            drawn.claims
        )
        assert check(drawn.image, drawn.claims).correct


def test_what_the_caption_leaves_open_takes_every_value_and_the_rest_stays() -> None:
    square = Object("square", "blue", "small", 3.5, 3.5, SIZES["small"])
    one = Sample("a blue square", "colors", (Exists(Kind("square", "blue")),), Scene("gray", (square,)))
    other = Sample("a square", "single_object", (Exists(Kind("square")),), one.scene)
    for sample, colors in ((one, {"blue"}), (other, set(COLORS))):
        scenes = [redrawn(sample, dice(seed)).scene for seed in range(300)]
        (things,) = zip(*(scene.objects for scene in scenes), strict=True)
        assert {thing.color for thing in things} == colors
        assert {scene.background for scene in scenes} == set(BACKGROUNDS)
        assert {(thing.shape, thing.size) for thing in things} == {("square", "small")}
        assert len({(thing.x, thing.y) for thing in things}) == 16  # every cell of the grid
