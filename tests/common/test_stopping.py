"""Signals that end programs: collected during the context, and handled as before after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from semantic_routing.common.stopping import ENDING, stop_signals


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_is_collected_and_its_handler_restored(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in ENDING}
    with stop_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
    assert {each: signal.getsignal(each) for each in ENDING} == before


@pytest.mark.behaviour(
    "Training", when="the program was started under nohup and its terminal closes", then="the run continues"
)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_signals_that_were_ignored_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            signal.raise_signal(number)
        assert received == []
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_background_jobs_of_a_shell_collect_signals_that_it_ignores(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            signal.raise_signal(number)
        assert received == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_second_key_press_interrupts_immediately(number: signal.Signals) -> None:
    with stop_signals() as received:
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert received == [number]
    with stop_signals(patient=True) as received:
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert received == [number] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_repeated_signals_of_machines_do_not_interrupt(number: signal.Signals) -> None:
    with stop_signals() as received:
        for _ in range(3):
            signal.raise_signal(number)
    assert received == [number] * 3


def test_other_threads_collect_nothing_and_change_no_handler() -> None:
    """Python can set handlers only in the main thread."""
    seen: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stop_signals() as received:
            seen.extend([received == [], signal.getsignal(signal.SIGTERM) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, True]


def test_a_worker_leaves_all_signals_to_its_parent() -> None:
    code = (
        "import signal; from semantic_routing.common.stopping import ENDING, leave_to_parent; leave_to_parent()\n"
        "for number in ENDING: signal.raise_signal(number)\n"
        "print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")
