"""One process without torchrun, and the shares of several."""

from __future__ import annotations

import pytest
import torch

from semantic_routing.common.distributed import Processes, World, open_world, processes


def test_shares_cover_the_work_once_and_evenly() -> None:
    shares = [Processes(rank, 3).share(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("join", [processes, open_world])
def test_one_process_is_the_first_whatever_else_the_environment_holds(join, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers set RANK, too."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    with join() as job:
        assert (job.rank, job.count, job.first) == (0, 1, True)
        job.wait()
        assert job.share([1, 2]) == [1, 2]


def test_a_world_of_one_process_answers_for_itself() -> None:
    world = World()
    assert world.everywhere(lambda: "a") == world.on_first(lambda: "a") == world.first_then_rest(lambda: "a") == "a"
    assert world.all_gather("a") == ["a"]
    assert world.max(3, 1) == [3, 1]
    assert world.mean(torch.tensor(2.5)) == 2.5

    def fail() -> None:
        raise ValueError("no data")

    for run in (world.everywhere, world.on_first, world.first_then_rest):
        with pytest.raises(ValueError, match=r"^no data$"):
            run(fail)
