"""The watchdog: whom it blames, what it forgives, and two real processes of which one hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from semantic_routing.training.watchdog import (
    POLLS,
    Note,
    Seen,
    Watchdog,
    WatchdogConfig,
    describe,
    describe_silence,
    hung,
    job_store,
)
from tests.helpers.forked import Forked

SECONDS = 60.0
"""After which a test gives up waiting for what must come."""


def seen(rank: int, step: int, beats: int, moved: float, phase: str = "forward", slow: bool = False) -> Seen:
    one = Seen(rank, float(moved))
    one.update(Note(host=f"h{rank}", step=step, beats=beats, phase=phase, slow=slow, pulse=1), float(moved))
    return one


def blamed(*processes: Seen, now: float, excused: float = 0.0) -> list[int]:
    return [one.rank for one in hung(processes, float(now), float(excused), timeout=10.0, grace=100.0)]


# --- whom to blame ---


def test_nobody_is_blamed_while_all_move() -> None:
    assert blamed(seen(0, 5, 1, moved=20), seen(1, 5, 1, moved=21), now=30) == []


def test_the_process_that_is_furthest_behind_is_blamed_for_all() -> None:
    """The others wait for it in a later phase of the step; what it did last may have been heard of after theirs."""
    waiting = [seen(rank, 5, 2, moved=20) for rank in (0, 1, 3)]
    for moved in (19.9, 20, 21.5):
        assert blamed(*waiting, seen(2, 5, 1, moved=moved, phase="loading data"), now=31) == [2]
        assert blamed(*waiting, seen(2, 4, 7, moved=moved), now=31) == [2]


def test_one_that_has_stopped_is_blamed_though_others_go_on() -> None:
    assert blamed(seen(0, 9, 1, moved=30), seen(1, 5, 1, moved=20), now=31) == [1]


def test_all_that_are_equally_far_are_blamed_together() -> None:
    assert blamed(*(seen(rank, 5, 2, moved=20) for rank in range(3)), now=31) == [0, 1, 2]


def test_a_checkpoint_gives_all_processes_its_grace() -> None:
    saving = seen(0, 5, 3, moved=20, phase="saving", slow=True)
    waiting = seen(1, 5, 2, moved=20)
    assert blamed(saving, waiting, now=119, excused=119) == []
    assert blamed(saving, waiting, now=121, excused=121) == [1]


def test_patience_starts_anew_when_the_slow_phase_is_over() -> None:
    """Those that waited for a long checkpoint cannot have moved at the moment at which it is done."""
    done, waiting = seen(0, 5, 4, moved=90), seen(1, 5, 2, moved=20)
    assert blamed(done, waiting, now=91, excused=90) == []
    assert blamed(done, waiting, now=101, excused=90) == [1]


def test_the_message_names_rank_host_step_and_phase() -> None:
    hanging = seen(3, 120, 1, moved=0, phase="loading data")
    text = "rank 3 on host h3 has not moved since step 120 (loading data) for 600 s"
    assert describe([hanging], 600.0) == text
    others = [seen(rank, 120, 1, moved=0) for rank in range(4, 14)]
    assert describe([hanging, *others], 600.0) == (
        f"{text}; nor have ranks 4, 5, 6, 7, 8, 9, 10, 11 ..., which are as far"
    )
    silent = describe_silence(seen(0, 7, 0, moved=5), 20.0)
    assert silent == "rank 0 on host h0 has not answered since step 7 (forward) for 15 s"


def test_any_beat_is_movement_and_a_pulse_is_only_life() -> None:
    one = seen(0, 5, 1, moved=10)
    one.update(replace(one.note, pulse=2), 20.0)
    assert (one.moved, one.alive) == (10, 20)
    one.update(replace(one.note, beats=2), 30.0)
    assert (one.moved, one.alive) == (30, 20)


# --- one process ---


class End:
    """Takes the place of the process's end."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.came = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.came.set()


def test_a_single_process_is_not_watched_unless_asked() -> None:
    before = threading.active_count()
    with Watchdog(WatchdogConfig()) as dog:
        dog.beat(1, "forward")
        assert threading.active_count() == before
    assert WatchdogConfig().seconds(world=2) == 600
    assert WatchdogConfig(timeout=0.0).seconds(world=2) == 0


def test_a_single_process_that_hangs_ends_with_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    end = End()
    with Watchdog(WatchdogConfig(timeout=0.2), end=end) as dog:
        dog.beat(6, "forward")
        dog.beat(7, "backward")
        assert end.came.wait(SECONDS)
    assert end.codes == [1]
    error = capfd.readouterr().err
    host = socket.gethostname()
    assert f"semroute: rank 0 on host {host} has not moved since step 7 (backward) for " in error
    assert "; this is rank 0 at step 7\n" in error
    assert "in test_a_single_process_that_hangs_ends_with_its_stack" in error


def wait_for_polls(store: HashStore, timeouts: int) -> None:
    """Return when rank 0's thread has polled as often as it does in some timeouts."""
    notes = PrefixStore("semroute/watchdog", store)
    first = json.loads(notes.get("0"))["pulse"]
    while json.loads(notes.get("0"))["pulse"] < first + timeouts * POLLS:
        time.sleep(0.001)


@pytest.mark.parametrize("phase", ["saving", "sampling", "validating"])
def test_what_takes_long_is_no_hang(phase: str) -> None:
    end, store = End(), HashStore()
    with Watchdog(WatchdogConfig(timeout=0.1, grace=1e6), store, end=end) as dog:
        dog.beat(6, "forward")
        dog.beat(7, phase)
        wait_for_polls(store, timeouts=3)
        assert not end.came.is_set()


def test_the_grace_is_never_less_than_the_timeout() -> None:
    assert Watchdog(WatchdogConfig(timeout=900.0, grace=600.0)).grace == 900
    assert Watchdog(WatchdogConfig(timeout=300.0, grace=600.0)).grace == 600


def test_the_first_step_may_compile() -> None:
    end, store = End(), HashStore()
    with Watchdog(WatchdogConfig(timeout=0.1, grace=1e6), store, end=end) as dog:
        dog.beat(1000, "loading data")  # a resumed run
        dog.beat(1000, "forward")
        wait_for_polls(store, timeouts=3)
        assert not end.came.is_set()
        dog.beat(1001, "forward")
        assert end.came.wait(SECONDS)


def test_a_first_process_that_does_not_run_is_seen_by_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    end = End()
    store = HashStore()
    with Watchdog(WatchdogConfig(timeout=0.2, grace=0.3), store, rank=1, world=2, end=end):
        assert end.came.wait(SECONDS)
    assert end.codes == [1]
    assert "rank 0 on host ? has not answered since step 0 (starting)" in capfd.readouterr().err


def test_processes_need_a_store_that_they_share() -> None:
    with pytest.raises(ValueError, match="need a store that they share"):
        Watchdog(WatchdogConfig(), rank=1, world=2)


@pytest.mark.parametrize("wrong", [{"timeout": -1.0}, {"grace": 0.0}])
def test_what_a_watchdog_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and grace"):
        WatchdogConfig(**wrong)


# --- several processes ---


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_the_jobs_store_is_torchruns_and_forgets_an_alarm_at_a_restart(
    server: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert job_store() is None
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(server.port))):
        monkeypatch.setenv(name, value)
    first = job_store()
    assert first is not None
    first.set("alarm", "old")
    same = job_store()
    assert same is not None
    assert same.get("alarm") == b"old"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarted = job_store()
    assert restarted is not None
    assert not restarted.check(["alarm"])


PROCESS = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from semantic_routing.training.watchdog import Watchdog
from semantic_routing.training.watchdog import WatchdogConfig

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
collective = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

def all_reduce(step):
    collective.set(f"{step}/{rank}", "here")
    collective.wait([f"{step}/0", f"{step}/1"], timedelta(seconds=300))

def read_a_file_that_hangs():
    time.sleep(300)

with Watchdog(WatchdogConfig(timeout=1.0, grace=60.0), store, rank, world=2) as dog:
    for step in range(9):
        dog.beat(step, "loading data")
        if step == 3 and rank == 1:
            read_a_file_that_hangs()
        dog.beat(step, "forward")
        all_reduce(step)
"""


@pytest.fixture
def job(server: TCPStore) -> Iterator[list[Forked]]:
    """Two processes of which the second hangs in step 3; killed in the end."""
    processes = [Forked(PROCESS, (rank, server.port)) for rank in (0, 1)]
    yield processes
    for process in processes:
        process.kill()


def test_a_hang_in_one_process_ends_all_and_names_it(job: list[Forked]) -> None:
    assert [process.wait() for process in job] == [1, 1]
    errors = [process.err for process in job]
    message = f"semroute: rank 1 on host {socket.gethostname()} has not moved since step 3 (loading data) for "
    assert [message in error for error in errors] == [True, True], errors
    assert "this is rank 0 at step 3" in errors[0]
    assert "in all_reduce" in errors[0]
    assert "in read_a_file_that_hangs" in errors[1]


def test_a_first_process_that_is_stopped_whole_ends_the_others(job: list[Forked], server: TCPStore) -> None:
    notes = PrefixStore("semroute/watchdog", server)
    while json.loads(notes.get("0"))["step"] < 3:
        time.sleep(0.01)
    os.kill(job[0].process.pid, signal.SIGSTOP)
    assert job[1].wait() == 1
    assert f"rank 0 on host {socket.gethostname()} has not answered since step 3 (forward) for " in job[1].err
