"""The figures of each arm, and their numbers against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import entr

from semantic_routing.analysis.distances import compare_routers, mean_similarity
from semantic_routing.analysis.profiles import profiles, routing_figures
from semantic_routing.analysis.routers import TIMES, routing_weights
from semantic_routing.analysis.statistics import js_similarity, total_variation, wasserstein_steps
from semantic_routing.model.dit import Backbone
from tests.helpers.networks import tiny_network

DEPTH, LAYERS = 4, 5
BLOCKS = ["similarity-blocks", "trend-blocks", "effective-layers-blocks"]
OVER_TIME = ["similarity-times", "trend-times", "effective-layers-times", "wasserstein-times"]


def trained(arm: str, scale: float = 1.0) -> Backbone:
    return tiny_network(arm, std=scale, depth=DEPTH, text_layers=LAYERS)


@pytest.mark.parametrize(
    ("arm", "names"),
    [
        ("penultimate", []),
        ("static", []),
        ("depth", BLOCKS),
        ("hard", BLOCKS),
        ("time", OVER_TIME),
        ("joint", BLOCKS + OVER_TIME),
        ("joint-state", BLOCKS + OVER_TIME),
    ],
)
def test_an_arm_has_the_figures_of_its_axes(arm: str, names: list[str]) -> None:
    assert [drawn.name for drawn in routing_figures(trained(arm))] == names


def test_the_figures_hold_the_formulas() -> None:
    model = trained("joint")
    weights = routing_weights(model, TIMES).astype(float)
    drawn = {figure.name: figure for figure in routing_figures(model)}
    assert len(TIMES) == 21
    assert drawn["similarity-blocks"].values == pytest.approx(js_similarity(weights.mean(0)), abs=1e-6)
    assert drawn["similarity-times"].values == pytest.approx(js_similarity(weights.mean(1)), abs=1e-6)
    assert drawn["wasserstein-times"].values[:, 0] == pytest.approx(wasserstein_steps(weights.mean(1)), abs=1e-6)
    assert drawn["wasserstein-times"].values.shape == (20, 1)
    centre = weights.mean(1) @ np.linspace(0, 1, LAYERS)
    assert drawn["trend-times"].values[:, 0] == pytest.approx(centre, abs=1e-6)
    axes = drawn["trend-times"].figure.axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx(centre, abs=1e-6)


def test_effective_layers_of_each_block_and_of_the_mean_over_blocks() -> None:
    model = trained("joint")
    weights = routing_weights(model, TIMES).astype(float)
    drawn = {figure.name: figure for figure in routing_figures(model)}
    for axis, other in (("times", 1), ("blocks", 0)):
        figure = drawn[f"effective-layers-{axis}"]
        assert figure.values[:, 0] == pytest.approx(np.exp(entr(weights).sum(-1)).mean(other), rel=1e-5)
        mean = weights.mean(other)
        assert figure.values[:, 1] == pytest.approx(np.exp(entr(mean).sum(-1)), rel=1e-5)
        assert figure.figure.axes[0].lines[0].get_ydata() == pytest.approx(figure.values[:, 0])
    (alone,) = [figure for figure in routing_figures(trained("depth")) if figure.name == "effective-layers-blocks"]
    assert alone.columns == ["effective layers"]


def test_equal_weights_have_one_colour() -> None:
    figure = {drawn.name: drawn.figure for drawn in routing_figures(trained("time", scale=0.0))}["similarity-times"]
    assert figure.axes[0].collections[0].get_clim() == (0.99, 1)


def test_profiles_leave_out_axes_that_routing_ignores() -> None:
    assert profiles(trained("depth")).by_time is None
    assert profiles(trained("time")).by_block is None
    found = profiles(trained("joint"))
    assert found.by_time is not None
    assert found.by_block is not None
    assert found.by_time.shape == (21, LAYERS)
    assert found.by_block.shape == (DEPTH, LAYERS)


def test_models_are_compared_pair_by_pair() -> None:
    models = [trained("depth"), trained("static"), trained("joint")]
    drawn = {figure.name: figure for figure in compare_routers(["a", "b", "c"], models)}
    values = drawn["models-total-variation"].values
    assert np.array_equal(values, values.T)
    assert np.diag(values) == pytest.approx(1)
    a, b = (routing_weights(model, TIMES).astype(float) for model in models[:2])
    assert values[0, 1] == pytest.approx(1 - total_variation(a, b).mean())
    assert mean_similarity(np.array([[1.0, 0.5], [0.5, 1.0]])) == 0.5
    axes = drawn["models-jensen-shannon"].figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    assert f"{mean_similarity(values):.4f}" in drawn["models-total-variation"].title
    assert (drawn["models-jensen-shannon"].values > values - 1e-9).all()  # divergence is at most total variation


def test_models_of_other_shapes_are_not_compared() -> None:
    small = tiny_network("depth", depth=2, text_layers=3)
    with pytest.raises(ValueError, match="b has 2 blocks reading 3 layers, a has 4 reading 5"):
        list(compare_routers(["a", "b"], [trained("depth"), small]))
