"""Resampling over prompts: closed forms, exact enumeration, images of a prompt together."""

from __future__ import annotations

from itertools import product
from math import isnan, sqrt

import numpy as np
import pytest

from semantic_routing.evaluation.records import Record
from semantic_routing.evaluation.resampling import bootstrap, permutation_test, prompt_sums
from semantic_routing.evaluation.summary import summarize

IDS = [f"{i:05d}" for i in range(9)]


def record(prompt: int, score: float | None, tag: str = "a", image: int = 0) -> Record:
    return Record(
        prompt=prompt, id=f"{prompt:05d}", image=image, caption="c", tags=(tag,), file="f", reason="",
        scores={"correct": score},
    )  # fmt: skip


def sums(scores, column=(("a", "b"),), tags="a", images=1):
    records = [record(p, score, tags[p % len(tags)], i) for p, score in enumerate(scores) for i in range(images)]
    ids = [f"{i:05d}" for i in range(len(scores))]
    return prompt_sums(records, ids, "correct", column), records


def test_the_value_is_the_tables():
    scores = [1.0, 0.0, None, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    columns = {"overall": (("a", "b"),), "mean": (("a",), ("b",)), "b": (("b",),)}
    for name, column in columns.items():
        found, records = sums(scores, column, "ab", images=2)
        assert found.value == pytest.approx(summarize(records, columns)["accuracy"][name], abs=1e-15)
    assert isnan(sums([None], (("a",),))[0].value)


def test_the_interval_is_as_wide_as_the_standard_error_says():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.5, 0.2, 400)
    low, high = bootstrap(sums(scores)[0], resamples=4000, seed=0)
    error = scores.std() / sqrt(400)
    assert (low + high) / 2 == pytest.approx(scores.mean(), abs=0.1 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_images_of_a_prompt_are_no_further_evidence():
    scores = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    one = bootstrap(sums(scores)[0], resamples=500, seed=1)
    assert bootstrap(sums(scores, images=4)[0], resamples=500, seed=1) == pytest.approx(one)


def test_a_difference_is_paired():
    """A run that is better by the same on every prompt is so in every resample."""
    scores = np.random.default_rng(0).uniform(size=50)
    better, base = sums(scores + 0.25)[0], sums(scores)[0]
    assert bootstrap(better, base, resamples=200, seed=0) == pytest.approx((0.25, 0.25))
    assert bootstrap(better, base, resamples=200, seed=0) == bootstrap(better, base, resamples=200, seed=0)


def test_p_values_are_those_of_all_arrangements():
    rng = np.random.default_rng(3)
    mine, theirs = rng.uniform(size=(2, 9))
    mine += 0.2
    differences = np.array([np.mean(np.array(signs) * (mine - theirs)) for signs in product((1, -1), repeat=9)])
    exact = np.mean(np.abs(differences) >= abs(np.mean(mine - theirs)) - 1e-12)
    found = permutation_test(sums(mine)[0], sums(theirs)[0], resamples=20_000, seed=0)
    assert found == pytest.approx(exact, abs=3 * sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_no_difference_is_no_evidence_and_a_constant_one_the_most():
    scores = np.linspace(0, 1, 9)
    assert permutation_test(sums(scores)[0], sums(scores)[0], resamples=99, seed=0) == 1.0
    # Only the two arrangements of one sign of 2^9 are as extreme.
    found = permutation_test(sums(scores + 1)[0], sums(scores)[0], resamples=20_000, seed=0)
    assert found == pytest.approx(2 / 2**9, abs=0.002)
    assert isnan(permutation_test(sums([None])[0], sums([1.0])[0], resamples=9, seed=0))


def test_the_observed_arrangement_is_one_of_the_permutations():
    one, other = sums([1.0] * 40)[0], sums([0.0] * 40)[0]
    for resamples in (1, 99, 600):
        assert permutation_test(one, other, resamples=resamples, seed=0) == 1 / (resamples + 1)


def test_p_values_are_even_where_nothing_differs():
    rng = np.random.default_rng(0)
    found = [
        permutation_test(sums(a)[0], sums(b)[0], resamples=199, seed=s)
        for s, (a, b) in enumerate(rng.normal(size=(200, 2, 30)))
    ]
    assert 0.40 < np.mean(found) < 0.60
    assert np.mean(np.array(found) < 0.05) < 0.12
