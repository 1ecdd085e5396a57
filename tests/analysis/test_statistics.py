"""Closed forms: point masses, uniform and two-point distributions, disjoint supports, shifts."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from semantic_routing.analysis.statistics import (
    center,
    dispersion,
    effective_layers,
    entropy,
    excess,
    js_divergence,
    js_similarity,
    marginals,
    neighbour_correlation,
    normalized,
    smoothness,
    support,
    total_variation,
    turning_points,
    wasserstein,
    wasserstein_steps,
)


def point(layer: int, layers: int = 5) -> np.ndarray:
    return np.eye(layers)[layer]


UNIFORM = np.full(5, 0.2)
RANDOM = np.random.default_rng(0).dirichlet(np.full(36, 0.3), size=8)


@pytest.mark.parametrize(("layer", "where"), [(0, 0.0), (1, 0.25), (4, 1.0)])
def test_a_point_mass_stands_at_its_layer_and_has_no_spread(layer: int, where: float) -> None:
    assert center(point(layer)) == where
    assert dispersion(point(layer)) == 0
    assert entropy(point(layer)) == 0
    assert effective_layers(point(layer)) == 1


def test_uniform_and_two_point_distributions() -> None:
    assert center(UNIFORM) == pytest.approx(0.5)
    assert dispersion(UNIFORM) == pytest.approx((5**2 - 1) / 12 / 4**2)  # of 0..4, on a step of 1/4
    assert entropy(UNIFORM) == pytest.approx(np.log(5))
    assert effective_layers(UNIFORM) == pytest.approx(5)
    ends = np.array([1.0, 0, 0, 0, 3])
    assert center(ends) == pytest.approx(0.75)
    assert dispersion(ends) == pytest.approx(0.25 * 0.75)


def test_one_layer_stands_at_zero() -> None:
    assert support(1).tolist() == [0]
    assert center(np.ones(1)) == 0
    assert dispersion(np.ones(1)) == 0
    assert wasserstein(np.ones(1), np.ones(1)) == 0


def test_weights_are_normalised_first() -> None:
    assert center(7 * RANDOM) == pytest.approx(center(RANDOM))
    assert normalized(np.array([1.0, 3.0])).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("wrong", [[[0.5, -0.5]], [[0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], [[np.nan, 1.0]]])
def test_negative_and_empty_weights_are_refused(wrong: list) -> None:
    with pytest.raises(ValueError, match="non-negative, with a positive sum"):
        center(np.array(wrong))


def test_jensen_shannon_of_disjoint_equal_and_half_overlapping() -> None:
    assert js_divergence(point(0), point(3)) == 1
    assert js_divergence(UNIFORM, UNIFORM) == 0
    # One layer against an equal mix of it and another: H(3/4, 1/4) - 1/2 bit.
    half = np.array([0.5, 0.5, 0, 0, 0])
    bits = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    assert js_divergence(point(0), half) == pytest.approx(bits)


def test_jensen_shannon_equals_scipys() -> None:
    similar = js_similarity(RANDOM)
    for i, p in enumerate(RANDOM):
        for j, q in enumerate(RANDOM):
            assert similar[i, j] == pytest.approx(1 - jensenshannon(p, q, base=2) ** 2, abs=1e-12)
    assert np.array_equal(similar, similar.T)
    assert np.diag(similar) == pytest.approx(1)


def test_wasserstein_of_a_shift_is_the_shift() -> None:
    for layer in range(5):
        assert wasserstein(point(0), point(layer)) == pytest.approx(layer / 4)
    spread = np.array([0.3, 0.7, 0, 0, 0])
    assert wasserstein(spread, np.roll(spread, 2)) == pytest.approx(2 / 4)
    assert wasserstein_steps(np.eye(5)) == pytest.approx(np.full(4, 0.25))


def test_wasserstein_equals_scipys() -> None:
    x = support(36)
    for p, q in pairwise(RANDOM):
        assert wasserstein(p, q) == pytest.approx(wasserstein_distance(x, x, p, q), abs=1e-12)


def test_total_variation_is_the_share_that_moved() -> None:
    assert total_variation(point(0), point(1)) == 1
    assert total_variation(UNIFORM, UNIFORM) == 0
    assert total_variation(UNIFORM, point(2)) == pytest.approx(0.8)


def test_marginals_of_a_product_are_its_factors() -> None:
    times, blocks = RANDOM[:3], RANDOM[3:7]
    weights = np.broadcast_to(times[:, None], (3, 4, 36))
    by_time, by_block = marginals(weights)
    assert by_time == pytest.approx(times)
    assert by_block == pytest.approx(np.broadcast_to(times.mean(0), (4, 36)))
    by_time, by_block = marginals(np.broadcast_to(blocks[None], (3, 4, 36)))
    assert by_time == pytest.approx(np.broadcast_to(blocks.mean(0), (3, 36)))
    assert by_block == pytest.approx(blocks)


def from_logits(*rows: list[float]) -> np.ndarray:
    """Return the weights of rows of logits."""
    return normalized(np.exp(np.array(rows)))


def test_excess_is_relative_to_the_uniform_share() -> None:
    weights = np.array([[0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert excess(weights, 0) == excess(weights, -1) == pytest.approx(-0.5)
    assert excess(weights, 1) == pytest.approx(0.5)


def test_layers_in_random_order_are_at_chance() -> None:
    orders = [from_logits([9.0, *order, -9.0]) for order in permutations([0.3, -1.0, 2.0, 0.1, 0.7])]
    assert np.mean([neighbour_correlation(weights) for weights in orders]) == pytest.approx(0, abs=1e-12)
    assert np.mean([turning_points(weights) for weights in orders]) == pytest.approx(0, abs=1e-12)


def test_inhibited_neighbours_and_a_smooth_preference_are_on_opposite_sides_of_chance() -> None:
    alternating = from_logits([5.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 5.0])
    assert neighbour_correlation(alternating) == pytest.approx(-1 + 1 / 5)
    assert turning_points(alternating) == pytest.approx(1 / 3)
    rising = from_logits([5.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0])
    assert neighbour_correlation(rising) > 0.5
    assert turning_points(rising) == pytest.approx(-2 / 3)
    both = from_logits([5.0, 0.0, 3.0, 2.0, 5.0, 4.0, 7.0, 5.0])  # rises in a zigzag
    assert neighbour_correlation(both) > 0
    assert turning_points(both) == pytest.approx(1 / 3)


def test_rows_that_are_uniform_say_nothing_of_neighbours() -> None:
    alternating, flat = [0.0, 1.0, -1.0, 1.0, -1.0, 0.0], [0.0] * 6
    assert neighbour_correlation(from_logits(alternating, flat)) == neighbour_correlation(from_logits(alternating))
    for weights in (from_logits(flat), from_logits([0.0, 1.0, 2.0, 3.0])):
        assert np.isnan([neighbour_correlation(weights), turning_points(weights)]).all()


def test_blocks_that_change_slowly_are_smooth() -> None:
    slow = np.stack([point(layer) for layer in (0, 0, 1, 1)]).astype(float)
    assert smoothness(slow) == pytest.approx(2 / 3)  # the pairs apart are disjoint, two of three adjacent are equal
    assert smoothness(slow[[0, 2, 1, 3]]) == pytest.approx(-2 / 3)
    assert np.isnan(smoothness(slow[:2]))
