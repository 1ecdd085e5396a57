"""Edits of routing weights: presets, cells, rows, gains."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_routing.explorer import edits
from semantic_routing.explorer.edits import LEARNED, ONE_BLOCK, ONE_LAYER, PENULTIMATE, PRESETS, UNIFORM, preset
from semantic_routing.model.arms import ARMS
from semantic_routing.model.override import RoutingOverride
from semantic_routing.model.routing import make_router

ROWS = ("block 0", "block 1", "block 2")
TABLE = np.array([[0.5, 0.3, 0.2, 0.0], [0.25] * 4, [0.0, 0.0, 0.0, 1.0]])
SOME = RoutingOverride(("block 2",), ((0.0, 1.0, 0.0, 0.0),))


def pick(name: str, edit: RoutingOverride | None = None) -> np.ndarray:
    return edits.applied(preset(name, edit, ROWS, 4, row=1, layer=0), ROWS, TABLE)


@pytest.mark.parametrize(("name", "arm"), [(PENULTIMATE, "penultimate"), (UNIFORM, "uniform")])
def test_presets_of_the_paper_are_its_arms(name: str, arm: str) -> None:
    assert name.startswith(ARMS[arm].label)
    expected = make_router(arm, 4, 3, 8).weights().expand(1, 3, 4)[0].numpy()
    np.testing.assert_allclose(pick(name), expected)


def test_other_presets() -> None:
    np.testing.assert_array_equal(pick(LEARNED, SOME), TABLE)
    np.testing.assert_array_equal(pick(ONE_LAYER, SOME), [[1, 0, 0, 0]] * 3)
    np.testing.assert_array_equal(pick(ONE_BLOCK, SOME), [TABLE[0], [1, 0, 0, 0], [0, 1, 0, 0]])
    names = [edits.preset_name(preset(name, None, ROWS, 4, row=1, layer=0), ROWS, 4) for name in PRESETS]
    assert names == [LEARNED, PENULTIMATE, UNIFORM, None, None]
    with pytest.raises(ValueError, match=r"unknown preset 'B9'"):
        pick("B9")


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 36])
def test_every_preset_is_a_valid_override_for_any_number_of_layers(layers: int) -> None:
    for name in PRESETS:
        made = preset(name, None, ROWS, layers, row=0, layer=layers - 1)
        assert made is None or len(made.weights[0]) == layers


def test_a_cell_is_set_and_the_rest_keeps_its_proportions() -> None:
    made = edits.with_cell(SOME, ROWS, TABLE, row=0, layer=0, weight=0.0)
    assert made.rows == ("block 0", "block 2")
    np.testing.assert_allclose(made.weights[0], [0, 0.6, 0.4, 0])
    made = edits.with_cell(None, ROWS, TABLE, row=0, layer=3, weight=0.5)
    np.testing.assert_allclose(made.weights[0], [0.25, 0.15, 0.1, 0.5])
    made = edits.with_cell(None, ROWS, TABLE, row=2, layer=3, weight=0.4)
    np.testing.assert_allclose(made.weights[0], [0.2, 0.2, 0.2, 0.4])


@pytest.mark.parametrize("layers", [1, 5, 36])
@pytest.mark.parametrize("weight", [0.0, 0.01, 0.37, 1.0])
def test_any_cell_gives_a_valid_row(layers: int, weight: float) -> None:
    table = np.random.default_rng(0).dirichlet(np.ones(layers), 1)
    made = edits.with_cell(None, ["block 0"], table, row=0, layer=layers // 2, weight=weight)
    assert layers == 1 or made.weights[0][layers // 2] == weight


def test_a_weight_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight is 1.2; it must be from 0 to 1"):
        edits.with_cell(None, ROWS, TABLE, row=0, layer=0, weight=1.2)


def test_a_gain_of_one_is_left_out() -> None:
    gains = edits.with_gain(edits.with_gain({}, 2, 0.5), 1, 3.0)
    assert gains == {1: 3, 2: 0.5}
    assert edits.with_gain(gains, 2, 1.0) == {1: 3}
    with pytest.raises(ValueError, match=r"the gain is 4; it must be from 0 to 3"):
        edits.with_gain({}, 1, 4.0)
