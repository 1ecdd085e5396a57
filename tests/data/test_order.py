"""The order of training: every sample once an epoch, the same everywhere, and independent random streams."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from semantic_routing.data.draws import another, draw, posterior_noise, sample_rng, stream_seed
from semantic_routing.data.order import Mixture, ShardOrder, locate

LATENT = (2, 4, 4)


def epoch_order(seed: int, epoch: int, length: int) -> list[int]:
    located = [locate(seed, position, length) for position in range(epoch * length, (epoch + 1) * length)]
    assert {epoch for epoch, _ in located} == {epoch}
    return [sample for _, sample in located]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 100, 1000, 4097])
def test_an_epoch_has_each_sample_once(length: int):
    for epoch in range(3):
        assert sorted(epoch_order(7, epoch, length)) == list(range(length))


def test_order_depends_on_seed_and_epoch():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order_is_the_same_on_every_machine():
    assert epoch_order(0, 0, 8) == [4, 5, 0, 1, 7, 6, 2, 3]
    far = [locate(42, position, 2**40) for position in (0, 1, 2**40)]
    assert far == [(0, 759764626243), (0, 886705818194), (1, 468619484939)]


@pytest.mark.parametrize("length", [2, 3, 4, 6, 7])
def test_every_sample_is_as_likely_at_every_place(length: int):
    trials = 1500
    counts = np.zeros((length, length))
    for seed in range(trials):
        counts[range(length), epoch_order(seed, 1, length)] += 1
    # Rows and columns of the table both sum to the trials, which leaves (n - 1)^2 degrees of freedom.
    statistic = ((counts - trials / length) ** 2 / (trials / length)).sum() * (length - 1) / length
    assert stats.chi2.sf(statistic, (length - 1) ** 2) > 1e-3


def test_every_permutation_of_four_is_as_likely():
    counts = Counter(tuple(epoch_order(seed, 0, 4)) for seed in range(2400))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("length", [10_000, 2**40])
def test_neighbours_in_the_stream_are_unrelated(length: int):
    places = np.array([locate(3, position, length)[1] for position in range(4000)]) / length
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 4 / np.sqrt(4000)
    assert stats.kstest((places[1:] - places[:-1]) % 1, "uniform").pvalue > 1e-3


def test_huge_sources_need_no_table():
    length = 2**40
    samples = [locate(0, position, length)[1] for position in range(10**6, 10**6 + 1000)]
    assert len(set(samples)) == 1000
    assert 0 <= min(samples) < 2**35  # 1000 uniform samples leave the lowest 1/32 empty once in 10^13 seeds
    assert max(samples) < length


def test_draws_are_pure_and_all_different():
    first = draw(1, 2, 3, LATENT)
    again = draw(1, 2, 3, LATENT)
    np.testing.assert_array_equal(first.noise, again.noise)
    assert (first.time_uniform, first.drop_uniform) == (again.time_uniform, again.drop_uniform)
    assert first.noise.shape == LATENT
    assert first.noise.dtype == np.float32
    keys = [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 3, 2), (0, 2, 3), (2**64 - 1, 2, 3)]
    for other in keys[1:]:
        assert not np.isin(first.noise, draw(*other, LATENT).noise).any()
        assert sample_rng(*keys[0]).random() != sample_rng(*other).random()


def test_noise_time_augmentation_and_posterior_are_separate_streams():
    d = draw(1, 2, 3, LATENT)
    uniforms = set(sample_rng(1, 2, 3).random(100, dtype=np.float32).tolist())
    assert not uniforms & {d.time_uniform, d.drop_uniform}
    assert not np.isin(d.noise, posterior_noise(1, 2, 3, LATENT)).any()
    assert not np.isin(d.noise, sample_rng(1, 2, 3).standard_normal(100, dtype=np.float32)).any()
    larger = draw(1, 2, 3, (16, 8, 8))  # another codec does not change times
    assert (larger.time_uniform, larger.drop_uniform) == (d.time_uniform, d.drop_uniform)


def test_draws_are_distributed_as_they_say():
    draws = [draw(0, sample, 0, (8,)) for sample in range(2000)]
    posterior = np.stack([posterior_noise(0, sample, 0, (8,)) for sample in range(2000)])
    noise = np.stack([d.noise for d in draws])
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(posterior.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest([d.time_uniform for d in draws], "uniform").pvalue > 1e-3
    assert stats.kstest([d.drop_uniform for d in draws], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise.ravel(), posterior.ravel())[0, 1]) < 4 / np.sqrt(16000)


@pytest.mark.parametrize("arguments", [(0, -1, 10), (0, 0, 0), (-1, 0, 10), (2**64, 0, 10)])
def test_places_outside_the_stream_are_errors(arguments: tuple[int, int, int]):
    with pytest.raises(ValueError, match=r"expected at least 0|must be from 0"):
        locate(*arguments)


SIZES = [[1], [5], [3, 0, 7, 1, 1, 2], [1] * 37, [13, 29, 31, 7] * 6, [0, 0, 2], [101]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 16])
def test_an_epoch_has_each_record_of_each_shard_once(sizes: list[int], window: int):
    order = ShardOrder(7, sizes, window)
    everything = [(shard, record) for shard, size in enumerate(sizes) for record in range(size)]
    for epoch in range(3):
        found = [order.locate(epoch * len(order) + place) for place in range(len(order))]
        assert {found_epoch for found_epoch, _, _ in found} == {epoch}
        assert sorted((shard, record) for _, shard, record in found) == everything
    assert [order.place(index) for index in range(len(order))] == everything


@pytest.mark.parametrize("window", [1, 2, 5])
def test_only_a_window_of_shards_is_read_from(window: int):
    sizes = [13, 29, 31, 7] * 6
    order = ShardOrder(0, sizes, window)
    for epoch in range(2):
        shards = [order.locate(epoch * len(order) + place)[1] for place in range(len(order))]
        begun = [shards.index(shard) for shard in range(len(sizes))]
        ended = [len(shards) - shards[::-1].index(shard) for shard in range(len(sizes))]
        opened = [sum(a <= place < b for a, b in zip(begun, ended, strict=True)) for place in range(len(order))]
        assert max(opened) == window


def test_records_of_a_window_are_well_mixed():
    order = ShardOrder(0, [200] * 4, 4)
    shards = np.array([order.locate(place)[1] for place in range(800)])
    assert stats.chisquare(np.bincount(shards[:400], minlength=4)).pvalue > 1e-3
    first = np.array([order.locate(place)[1:] for place in range(800)]) @ (200, 1)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(800)


def test_shards_come_in_another_order_in_every_epoch_and_for_every_seed():
    orders = set()
    for seed in range(3):
        order = ShardOrder(seed, [1] * 30, 1)
        orders |= {tuple(order.locate(epoch * 30 + i)[1] for i in range(30)) for epoch in range(3)}
    assert len(orders) == 9


def test_places_are_found_in_any_order_of_asking():
    order, again = (ShardOrder(3, [13, 29, 31, 7] * 6, 5) for _ in range(2))
    forward = [order.locate(position) for position in range(3 * len(order))]
    assert [again.locate(position) for position in reversed(range(3 * len(order)))] == forward[::-1]


def test_the_order_of_shards_is_the_same_on_every_machine():
    order = ShardOrder(42, [4, 2, 5, 3], 2)
    assert [order.locate(place)[1:] for place in range(7)] == [(2, 1), (2, 4), (2, 0), (2, 2), (2, 3), (3, 2), (3, 0)]


@pytest.mark.parametrize(("sizes", "window"), [([], 1), ([0, 0], 1), ([1, -1, 3], 1), ([1], 0)])
def test_orders_of_nothing_are_errors(sizes: list[int], window: int):
    with pytest.raises(ValueError, match="no records"):
        ShardOrder(0, sizes, window)


WEIGHTS = [(1.0,), (0.7, 0.2, 0.1), (3.0, 1.0, 1.0), (0.001, 0.999), (5.0, 7.0, 11.0, 13.0, 1.0), (1 / 3.2, 1.0)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_mixtures_are_exact_to_within_one_at_every_position(weights: tuple[float, ...]):
    mixture = Mixture(weights)
    given = [0] * len(weights)
    for position in range(min(2 * sum(mixture.weights) + 3, 4000)):
        source, place = mixture.locate(position)
        assert place == given[source]
        given[source] += 1
        for count, weight in zip(given, weights, strict=True):
            assert abs(count - (position + 1) * weight / sum(weights)) < 1
    assert mixture.locate(10**15)[1] < 10**15 * max(weights) / sum(weights) + 1


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (float("nan"),), (float("inf"),)])
def test_impossible_weights(weights: tuple[float, ...]):
    with pytest.raises(ValueError, match="must be above 0"):
        Mixture(weights)


def test_weights_that_never_come_out_even_say_what_to_do():
    with pytest.raises(ValueError, match="round them"):
        Mixture((0.1234567, 0.7654321))


def test_sources_have_seeds_of_their_own_and_the_first_the_runs():
    seeds = [stream_seed(5, source) for source in range(100)] + [stream_seed(6, source) for source in range(100)]
    assert (seeds[0], seeds[100]) == (5, 6)
    assert len(set(seeds)) == 200
    assert max(seeds) < 2**64


def test_stand_ins_are_spread_evenly():
    drawn = np.bincount([another(0, sample, 1, attempt, 10) for sample in range(100) for attempt in range(1, 21)])
    assert stats.chisquare(drawn).pvalue > 1e-3
