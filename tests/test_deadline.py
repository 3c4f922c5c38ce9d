"""When a job stops to be saved before its end, by a clock of the test's own."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import ROOT
from toolkit.cluster import deadline
from toolkit.cluster.deadline import Deadline
from toolkit.signals import StopSignals

SAVED = {"checkpoint": {"step": 5, "took_s": 4.0, "stalled_s": 1.0}}


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    monotonic = time


class Scheduled:
    """A job with an end, as its supervisor sees it."""

    def __init__(self, clock: Clock, end_s: float | None, lead_s: float = 60.0) -> None:
        self.clock, self.ends_at_s, self.status = clock, end_s, dict[str, Any]()
        self.asked = 0
        self.signals = StopSignals()
        self.deadline = Deadline(self.signals, self._answer, lambda: self.status, lead_s)

    def _answer(self) -> float | None:
        self.asked += 1
        return self.ends_at_s

    def listen(self) -> None:
        self.deadline.listen()
        until(lambda: self.asked == 1)

    def warned(self) -> None:
        """Slurm sends USR2, and its end is asked for."""
        self.signals.received = signal.SIGUSR2
        asked = self.asked
        self.received()
        until(lambda: self.asked > asked)
        time.sleep(0.05)

    def received(self) -> signal.Signals | None:
        return self.deadline.received


def until(reached: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(deadline, "time", found)
    return found


def test_the_margin_is_what_a_save_and_a_step_take_as_measured(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 3600)
    job.listen()
    assert job.deadline.margin_s() == 60, "the lead, as long as nothing is known"
    job.status = {"step": 10} | SAVED
    job.deadline._measure()
    assert job.deadline.margin_s() == 3 * (5 + 1) + 5
    clock.now_s += 100
    job.status = {"step": 15} | SAVED
    job.deadline._measure()
    assert job.deadline.margin_s() == 3 * (5 + 20) + 5


def test_a_step_that_lasts_longer_than_a_look_is_measured_whole(clock: Clock) -> None:
    job = Scheduled(clock, None)
    for _ in range(14):
        job.status = {"step": int((clock.now_s - 1000) // 60)} | SAVED
        job.deadline._measure()
        clock.now_s += 10
    assert job.deadline.step_s == 60


def test_it_stops_in_time_without_any_warning(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 3600)
    job.listen()
    job.status = {"step": 10} | SAVED
    job.deadline._measure()
    clock.now_s = 1000 + 3600 - 23.5
    assert job.received() is None
    clock.now_s = 1000 + 3600 - 22.5
    assert job.received() == signal.SIGUSR2


def test_a_warning_with_time_left_is_no_reason_to_stop_yet(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 3600)
    job.listen()
    job.status = {"step": 0} | SAVED
    clock.now_s = 1000 + 3600 - 60
    job.warned()
    assert job.received() is None
    clock.now_s = 1000 + 3600 - 22
    assert job.received() == signal.SIGUSR2


def test_a_preemption_shows_as_an_end_that_has_come_near(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 36000)
    job.listen()
    clock.now_s += 500
    job.ends_at_s = clock.now_s + 10
    job.warned()
    assert job.received() == signal.SIGUSR2


def test_more_time_that_somebody_has_given_is_used(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 100)
    job.listen()
    job.status = {"step": 0} | SAVED
    job.ends_at_s = 1000.0 + 7200
    job.warned()
    clock.now_s = 1000 + 99
    assert job.received() is None


def test_who_cannot_ask_slurm_stops_when_warned(clock: Clock) -> None:
    job = Scheduled(clock, None)
    job.listen()
    assert job.received() is None
    job.warned()
    assert job.received() == signal.SIGUSR2


def test_an_end_that_was_known_is_not_forgotten_when_slurm_is_away(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 600)
    job.listen()
    job.ends_at_s = None
    clock.now_s += 550
    assert job.received() == signal.SIGUSR2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_order_to_stop_is_followed_at_once(number: signal.Signals, clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 36000)
    job.listen()
    job.signals.received = number
    assert job.received() == number


def test_a_short_limit_leaves_half_of_it_for_training(clock: Clock) -> None:
    job = Scheduled(clock, 1000.0 + 60, lead_s=120.0)
    job.listen()
    job.warned()  # Slurm warns at once of what is so near
    assert job.received() is None
    clock.now_s += 29
    assert job.received() is None
    clock.now_s += 2
    assert job.received() == signal.SIGUSR2


def test_a_job_without_an_end_goes_on(clock: Clock) -> None:
    job = Scheduled(clock, None)
    job.listen()
    clock.now_s += 10**7
    assert job.received() is None
    assert [thread.name for thread in threading.enumerate()].count("toolkit-deadline") >= 1


TOLD_TO_STOP = """
import signal, sys
from toolkit.cluster.deadline import Deadline
from toolkit.signals import StopSignals
signals = StopSignals()
signals.received = signal.SIGTERM
sys.exit(Deadline(signals, lambda: None, dict, 60.0).received)
"""


def test_a_full_disk_under_the_log_of_the_job_keeps_no_stop_from_the_ranks() -> None:
    with open("/dev/full", "wb") as full:
        words = [sys.executable, "-c", TOLD_TO_STOP]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == signal.SIGTERM
