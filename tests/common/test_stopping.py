"""The signals that end programs: noted while work goes on, and as they were before and after."""

from __future__ import annotations

import signal

import pytest

from semantic_routing.common.stopping import ENDING, stop_signals


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_is_noted_and_then_does_what_it_did(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in ENDING}
    with stop_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
    assert {each: signal.getsignal(each) for each in ENDING} == before


@pytest.mark.behaviour(
    "Training", when="the program was started under nohup and its terminal closes", then="the run goes on"
)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_what_is_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            signal.raise_signal(number)
        assert received == []
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_background_jobs_of_a_shell_still_hear_what_ends_them(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            signal.raise_signal(number)
        assert received == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_people_who_press_the_key_twice_do_not_wait(number: signal.Signals) -> None:
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
def test_what_machines_send_again_changes_nothing(number: signal.Signals) -> None:
    with stop_signals() as received:
        for _ in range(3):
            signal.raise_signal(number)
    assert received[0] == number
