"""What a supervisor does about how attempts end: which it starts again, and what status.json says. No rank is real."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import DIGITS
from toolkit import ending
from toolkit.attempt import Look, Note
from toolkit.cluster import batch
from toolkit.cluster.plan import Nodes, Plan
from toolkit.cluster.profile import Profile
from toolkit.config import load_job
from toolkit.distributed import ALONE
from toolkit.postmortem import Failure
from toolkit.run import STOP, Run
from toolkit.signals import StopSignals
from toolkit.standing import asked_to_end
from toolkit.supervisor import Consequence, Supervisor
from toolkit.verdict import Outcome

AWAY = (2, "run.dir s3://b/x cannot be written: the store is away")


class Ended:
    """An attempt whose one rank has ended with a status and a message, and has claimed the run before if it has a
    `claim`.
    """

    processes = 1

    def __init__(self, folder: Path, status: int, message: str, claim: int | None = None) -> None:
        self.folder, self.claim = folder, claim
        self.note: Note = {"pid": 7, "host": "n1", "exit": status, "message": message, "time_s": 0.0, "blamed": None}

    def start(self, words: Sequence[str], environment: Any) -> None:
        if self.claim:
            claimed(self.claim)
            say("preempted", self.claim, asked=[STOP])

    def look(self) -> Look:
        return Look({0: self.note}, torchruns=[1])

    def end(self) -> list[str]:
        return []


class Place:
    """Where attempts end as was foreseen."""

    def __init__(self, *ends: tuple[Any, ...]) -> None:
        self.ends, self.failures = list(ends), list[Failure]()

    def attempt(self, folder: Path) -> Any:
        return Ended(folder, *self.ends.pop(0))

    def after(self, failure: Failure, saved_step: int | None) -> Consequence:
        self.failures.append(failure)
        return Consequence()


@pytest.fixture(autouse=True)
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(DIGITS)
    return Run("runs/digits")


def ended(place: Any, was_started: bool = False) -> Outcome:
    return Supervisor(load_job("digits.yaml"), [], {}, StopSignals(), place, was_started).run()


def say(state: str, attempt: int, **more: Any) -> None:
    Run("runs/digits").mark(state, attempt=attempt, exit=75, **more)


def claimed(attempt: int) -> None:
    """The run by a process that has ended."""
    folder = Path("runs/digits/lock")
    folder.mkdir(parents=True, exist_ok=True)
    claim = {"attempt": attempt, "pid": 7, "host": "n1", "released": True}
    (folder / f"attempt-{attempt:04d}.json").write_text(json.dumps(claim))


def test_what_ranks_are_refused_for_at_the_first_start_is_wrong_and_nothing_is_written(digits: Run) -> None:
    assert ended(Place(AWAY))[:2] == AWAY
    assert not Path("runs").exists()


@pytest.mark.parametrize(("was_started", "before"), [(False, [(1, "torn in two")]), (True, [])])
def test_a_refusal_of_what_was_right_before_is_a_failure_until_it_comes_back(
    digits: Run, was_started: bool, before: list[tuple[int, str]]
) -> None:
    place = Place(*before, AWAY, AWAY)
    outcome = ended(place, was_started)
    assert (outcome.status, place.ends, len(place.failures)) == (1, [], len(before) + 2)
    assert "not started again: the same failure has come back" in outcome.message
    status = digits.status() or {}
    assert (status["state"], status["exit"], status["reason"]) == ("failed", 1, f"rank 0: {AWAY[1]}")


@pytest.mark.parametrize("state", ["preempted", "completed"])
def test_a_start_that_fails_before_it_has_the_run_is_not_told_as_the_end_of_the_one_before(
    digits: Run, state: str
) -> None:
    claimed(3)
    say(state, 3)
    ended(Place((1, "no module named mine"), (1, "no module named mine")))
    status = digits.status() or {}
    assert (status["state"], status["exit"]) == ("failed", 1)


def test_who_had_asked_for_an_end_gets_it_though_something_died_after_all_was_saved(digits: Run) -> None:
    outcome = ended(Place((1, "torn in two", 1)))
    assert "not started again, for a stop was asked for" in outcome.message
    assert (digits.status() or {})["state"] == "preempted"


def test_a_request_to_stop_is_remembered_though_a_signal_came_in_the_same_second(digits: Run) -> None:
    digits.ask(STOP)
    digits.wishes = frozenset({STOP})
    signals = SimpleNamespace(received=SimpleNamespace(name="SIGUSR2"))
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(step=5), agreed={"stop"}, finished=False, ranks=ALONE, total_steps=9, global_batch_size=1
    )
    ending.ended(digits, "digits", trainer, lambda step: 0, False, signals, Console(quiet=True))
    assert not digits.wished(STOP)
    assert asked_to_end(digits)
    digits.mark("queued")
    assert not asked_to_end(digits), "it was submitted again"


@pytest.mark.parametrize(("before", "after"), [("queued", "failed"), ("preempted", "failed"), ("completed",) * 2])
def test_a_refused_job_is_told_in_its_run_unless_that_is_over(
    digits: Run, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    say(before, 3)
    started = list[bool]()

    class Refused(Supervisor):
        def run(self) -> Outcome:
            started.append(self.was_started)
            return Outcome(2, "no such model")

    monkeypatch.setattr(batch, "Supervisor", Refused)
    monkeypatch.setattr(batch.StopSignals, "listen", lambda self: self)
    monkeypatch.setattr(batch.Deadline, "listen", lambda self: self)
    monkeypatch.setattr(batch, "be_subreaper", lambda: None)
    plan = Plan(load_job("digits.yaml"), Profile(gpus_per_node=1), Nodes.parsed("1"))
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    assert batch.supervise(plan, [], [], environment) == 2
    assert (digits.status() or {})["state"] == after
    batch.supervise(plan, [], [], {**environment, "SLURM_RESTART_COUNT": "1"})
    assert started == [False, True]
