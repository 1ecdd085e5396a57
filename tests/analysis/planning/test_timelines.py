"""The simulated timelines of steps and runs, against closed forms."""

from __future__ import annotations

from itertools import islice

import pytest

from semantic_routing.analysis.planning.events import Task, simulate
from semantic_routing.analysis.planning.run import Failure, Run, cost_of_one, play, random_failures
from semantic_routing.analysis.planning.step import Seconds, time_step

DEPTH = 3
PART = Seconds(
    load=0.5, encode=0.3, codec=0.2, text=0.01, block=0.1, gather_text=0.02, gather_block=0.03, scatter_text=0.04,
    scatter_block=0.05, reduce_text=0.06, reduce_block=0.07, update=0.08,
)  # fmt: skip
FORWARD = 0.01 + DEPTH * 0.1
PRODUCTS = 3 * FORWARD


def test_resources_take_the_most_urgent_task_that_is_ready() -> None:
    tasks = [Task("a", 2.0), Task("a", 1.0, urgency=1), Task("b", 1.0), Task("a", 1.0, after=(2,))]
    assert simulate(tasks) == [(0, 2), (3, 4), (0, 1), (2, 3)]


def test_tasks_that_wait_for_each_other_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 of 2 tasks wait for each other"):
        simulate([Task("a", 1.0, after=(1,)), Task("b", 1.0, after=(0,))])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_overlap_a_step_is_the_sum_of_its_parts(accumulate: int) -> None:
    gathers = 2 * (0.02 + DEPTH * 0.03)
    once = 0.5 + 0.3 + 0.2 + 0.04 + 0.06 + DEPTH * (0.05 + 0.07) + 0.08
    found = time_step(PART, DEPTH, accumulate, overlap=False)
    assert found.seconds == pytest.approx(once + accumulate * (gathers + PRODUCTS))


def test_with_nothing_on_the_links_a_step_is_its_products() -> None:
    found = time_step(PART.without("gather", "scatter", "reduce"), DEPTH)
    assert found.seconds == pytest.approx(0.5 + PRODUCTS + 0.08)  # language model and autoencoder, then the network
    assert found.bottleneck == "products"
    assert found.busy["products"] == pytest.approx(1)
    assert found.busy["data"] == pytest.approx(0.5 / found.seconds)


def test_a_slow_loader_sets_the_pace() -> None:
    slow = Seconds(load=5.0, block=0.1, encode=0.3)
    found = time_step(slow, DEPTH)
    assert found.seconds == pytest.approx(5.0)
    assert found.bottleneck == "data"
    assert found.busy["data"] == pytest.approx(1)


def test_slow_gathers_set_the_pace_and_frozen_networks_fill_the_gaps() -> None:
    slow = Seconds(block=0.001, gather_block=1.0, encode=1.0)
    found = time_step(slow, DEPTH)
    assert found.bottleneck == "links"
    assert found.seconds == pytest.approx(2 * DEPTH, rel=0.01)
    assert time_step(slow, DEPTH, gathered_again=False).seconds == pytest.approx(DEPTH, rel=0.01)


RUN = Run(steps=100, step=1.0, checkpoint_every=10, copy=0.5, write=4.0, detect=60.0, restart=20.0)
CALM = 100 + 10 * 0.5 + 4  # steps, copies, and the last write


def test_a_run_without_failures() -> None:
    found = play(RUN)
    assert found.total == pytest.approx(CALM)
    assert found.saving == pytest.approx(10 * 0.5 + 4)


def test_a_checkpoint_waits_for_the_one_before() -> None:
    slow = Run(steps=30, step=1.0, checkpoint_every=10, write=14.0)
    assert play(slow).total == pytest.approx(10 + 14 + 14 + 14)


def test_pauses() -> None:
    run = Run(steps=20, step=1.0, checkpoint_every=20, pauses=((5, 2.0), (10, 3.0)))
    assert play(run).total == pytest.approx(20 + 4 * 2 + 2 * 3)


@pytest.mark.parametrize("hang", [False, True])
def test_one_failure(hang: bool) -> None:
    # The checkpoint of step 20 was copied at 21 s and complete at 25 s.
    found = play(RUN, [Failure(26.0, hang)])
    waited = 60.0 if hang else 0.0
    assert (found.failures, found.lost, found.detecting, found.restarting) == (1, 26.0 - 21.0, waited, 20.0)
    assert found.total == pytest.approx(CALM + 5 + waited + 20)


def test_a_checkpoint_that_is_not_complete_does_not_count() -> None:
    found = play(RUN, [Failure(24.0)])
    assert found.lost == pytest.approx(24.0 - 10.5)  # from the checkpoint of step 10


def test_a_failure_before_the_first_checkpoint_loses_all() -> None:
    assert play(RUN, [Failure(9.0)]).total == pytest.approx(CALM + 9 + 20)


def test_one_crash_costs_half_an_interval_the_write_and_the_restart() -> None:
    run = Run(steps=100_000, step=1.0, checkpoint_every=1000, write=40.0, restart=20.0)
    assert cost_of_one(run) == pytest.approx(500 + 40 + 20, rel=0.02)


def test_random_failures_are_a_function_of_the_seed() -> None:
    first, again, other = (list(islice(random_failures(seed, 50.0, 0.3), 2000)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sum(failure.after for failure in first) / 2000 == pytest.approx(50, rel=0.1)
    assert sum(failure.hang for failure in first) / 2000 == pytest.approx(0.3, abs=0.05)
    total = play(RUN, first).total
    assert total == play(RUN, again).total > CALM
