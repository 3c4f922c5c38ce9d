"""How failures are found and told, without any: who hangs, what a signal means, the page, the odd rank."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from toolkit import oom, postmortem, pulse, watchdog, world
from toolkit.attempt import Look
from toolkit.deaths import killed
from toolkit.errors import JobError
from toolkit.oom import OomWatch
from toolkit.postmortem import Failure
from toolkit.pulse import Pulse
from toolkit.stacks import PATIENCE_S, innermost, where

LIMITS = {"start": 100.0, "step": 10.0, "evaluation": 20.0, "save": 30.0}


def overdue(folder: Path, processes: int, since_s: float) -> list[int]:
    """Who is late of the ranks in a folder."""
    notes = {int(path.stem[5:]): json.loads(path.read_text()) for path in folder.glob("rank-*.json")}
    found = {rank: pulse.read(str(folder / f"rank-{rank}.pulse")) for rank in notes}
    beats = {rank: beat for rank, beat in found.items() if beat}
    return watchdog.overdue(Look(notes, beats), processes, LIMITS, since_s)


def beat(folder: Path, rank: int, phase: str, step: int, ago_s: float) -> None:
    """A rank that has started, and its last heartbeat."""
    content = struct.pack("<qqd", pulse.PHASES.index(phase), step, time.monotonic() - ago_s)
    (folder / f"rank-{rank}.pulse").write_bytes(content)
    (folder / f"rank-{rank}.json").write_text(f'{{"pid": {os.getpid()}}}')


@pytest.mark.parametrize(("phase", "limit_s"), LIMITS.items())
def test_each_phase_has_a_limit_of_its_own(tmp_path: Path, phase: str, limit_s: float) -> None:
    beat(tmp_path, 0, phase, 7, limit_s - 5)
    beat(tmp_path, 1, phase, 7, limit_s + 0.1)
    assert overdue(tmp_path, 2, 0) == [1]


def test_a_rank_that_never_came_is_overdue_after_the_limit_of_the_start(tmp_path: Path) -> None:
    beat(tmp_path, 0, "start", 0, 1)
    assert overdue(tmp_path, 2, time.monotonic() - 99) == []
    assert overdue(tmp_path, 2, time.monotonic() - 101) == [1]


def test_a_rank_that_waits_for_one_in_a_longer_phase_is_not_late(tmp_path: Path) -> None:
    beat(tmp_path, 0, "save", 7, 25)
    beat(tmp_path, 1, "step", 7, 24)
    assert overdue(tmp_path, 2, 0) == []
    beat(tmp_path, 0, "save", 7, 31)
    assert overdue(tmp_path, 2, 0) == [0, 1]
    beat(tmp_path, 0, "save", 7, 1)
    assert overdue(tmp_path, 2, 0) == [1]


def test_nobody_is_late_for_what_passed_while_the_supervisor_stood_still_too(tmp_path: Path) -> None:
    beat(tmp_path, 0, "step", 7, 1000)
    beat(tmp_path, 1, "step", 7, 1000)
    assert overdue(tmp_path, 2, time.monotonic() - 9) == []
    assert overdue(tmp_path, 2, time.monotonic() - 11) == [0, 1]


def test_a_rank_that_has_left_its_last_word_is_not_overdue(tmp_path: Path) -> None:
    beat(tmp_path, 0, "step", 7, 1000)
    (tmp_path / "rank-0.json").write_text('{"pid": 1, "exit": 0, "message": ""}')
    assert overdue(tmp_path, 1, time.monotonic()) == []


def test_where_a_rank_is_is_the_innermost_line_of_its_main_thread(tmp_path: Path) -> None:
    stacks = tmp_path / "rank-0-stacks.log"
    stacks.write_text(
        "rank 0 (pid 7, stopped):\n"
        "Current thread 0x01 (most recent call first):\n"
        '  File "pool.py", line 1 in wait\n'
        "\n"
        "Thread 0x02 (most recent call first):\n"
        '  File "mine.py", line 20 in forward\n'
        '  File "trainer.py", line 3 in step\n'
        "a child of rank 0, such as a loader worker (pid 8, sleeping):\n"
        "Current thread 0x03 (most recent call first):\n"
        '  File "queue.py", line 9 in get\n'
    )
    assert innermost(stacks) == '"mine.py", line 20 in forward'
    assert innermost(tmp_path / "none") == ""


FAMILY = """
import faulthandler, os, signal, sys, time
out = open(sys.argv[1], "ab", buffering=0)
faulthandler.register(signal.SIGQUIT, out, all_threads=True)
heard, told = os.pipe()
for silent in (True, False):
    if os.fork() == 0:
        if silent:
            signal.signal(signal.SIGQUIT, lambda *caught: None)
        os.write(told, b".")
        while os.getppid() != 1:
            time.sleep(0.1)
        sys.exit()
os.read(heard, 1), os.read(heard, 1)
print("ready", flush=True)
time.sleep(120)
"""


def test_many_silent_processes_are_waited_for_together(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}-stacks.log" for rank in range(6)]
    ranks = [subprocess.Popen([sys.executable, "-c", FAMILY, str(log)], stdout=subprocess.PIPE) for log in logs]
    try:
        assert all(process.stdout and process.stdout.readline() for process in ranks)
        began_s = time.monotonic()
        found = where(tmp_path, {rank: {"pid": process.pid} for rank, process in enumerate(ranks)})
        assert time.monotonic() - began_s < 3 * PATIENCE_S, "not 6 silent ones after one another"
    finally:
        for process in ranks:
            everyone = [process, *psutil.Process(process.pid).children()]
            for one in everyone:
                one.kill()
            process.communicate(timeout=30)
    for rank, log in enumerate(logs):
        own, silent, answers = log.read_text().split("a child of")
        assert own.startswith(f"rank {rank} (pid {ranks[rank].pid}, ")
        assert "most recent call first" in own
        assert "it did not answer within" in silent
        assert "most recent call first" in answers
        assert found[rank].line.startswith('"<string>", line ')


@pytest.mark.parametrize(
    ("number", "evidence", "words"),
    [
        (signal.SIGKILL, "oom-kill", "was killed by the kernel: out of memory"),
        (signal.SIGKILL, None, "was killed by SIGKILL: somebody killed it, or"),
        (signal.SIGBUS, None, "/dev/shm is too small"),
        (signal.SIGSEGV, None, "native code read or wrote memory"),
        (signal.SIGHUP, None, "was killed by SIGHUP"),
        (None, None, "torchrun does not say how"),
    ],
)
def test_a_signal_is_said_in_words_with_a_remedy(number: Any, evidence: str | None, words: str) -> None:
    _, cause, remedy = killed(number, evidence)
    assert words in cause
    assert remedy


@pytest.mark.parametrize(
    ("cgroups", "file"),
    [
        ("0::/jobs/one\n", "jobs/one/memory.events"),
        ("9:memory:/jobs/one\n3:cpu:/\n", "memory/jobs/one/memory.oom_control"),
    ],
    ids=["v2", "v1"],
)
def test_a_kill_that_the_cgroup_has_counted_is_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroups: str, file: str
) -> None:
    counter = tmp_path / file
    counter.parent.mkdir(parents=True)
    counter.write_text("low 0\noom_kill 3\n")
    monkeypatch.setattr(oom, "CGROUPS", tmp_path)
    monkeypatch.setattr(oom, "_cgroups_of", lambda pid: cgroups)
    watch = OomWatch()
    watch.look([1])
    assert watch.verdict(-1) is None
    counter.write_text("low 0\noom_kill 4\n")
    assert "has just counted a kill" in str(watch.verdict(-1))


def failure(**changes: Any) -> Failure:
    given: dict[str, Any] = {
        "who": "rank 1 (pid 7)", "kind": "SIGKILL", "cause": "was killed by SIGKILL", "remedy": "start again",
        "pulse": Pulse("save", 30, time.monotonic()), "rank": 1, "host": "node7",
    }  # fmt: skip
    return Failure(**given | changes)


def test_the_page_has_rank_host_phase_step_cause_remedy_heartbeats_and_log() -> None:
    beats = {0: Pulse("step", 31, time.monotonic() - 2), 1: Pulse("save", 30, time.monotonic() - 3)}
    log = "\n".join(f"line {number}" for number in range(100)) + "\n```\n"
    text = postmortem.page(failure(pulses=beats, cause="a|b\nc"), 4, log, 20, "starting again")
    for words in (
        "# Attempt 4 failed", "| first to fail | rank 1 |", "| host | node7 |", "| phase | save |",
        "| step | 30 steps done |", "| newest checkpoint | step 20 |", "What to do: start again.",
        "What was done: starting again.", "| 0 | step | 31 | 2.0 |", "| 1 | save | 30 | 3.0 |", "line 99",
        "**rank 1 (pid 7) a\\|b; c**",
    ):  # fmt: skip
        assert words in text, words
    assert "line 50" not in text
    assert text.count("```") == 2, "nothing in the log ends the block it stands in"


def test_a_failure_comes_back_if_it_is_of_the_same_kind_at_the_same_step() -> None:
    assert failure().comes_back(failure(who="rank 0", rank=0))
    assert not failure().comes_back(failure(kind="SIGSEGV"))
    assert not failure().comes_back(failure(pulse=Pulse("step", 31, 0.0)))
    assert not failure().comes_back(None)


def test_a_start_that_ended_in_words_needs_no_page_from_the_next() -> None:
    who = {"host": "h", "boot_id": "b"}
    status = {"state": "running", "host": "h", "boot_id": "b", "pid": 2**22 + 1, "attempt": 2, "step": 9}
    assert "ended without a word" in str(postmortem.of_silent_end(status, who))
    for state in ("completed", "failed", "preempted"):
        assert postmortem.of_silent_end(status | {"state": state}, who) is None
    assert postmortem.of_silent_end({}, who) is None


ALIKE = dict.fromkeys(world.MUST_AGREE, "x")


@pytest.mark.parametrize("key", world.MUST_AGREE)
def test_the_odd_rank_is_named_with_what_it_has(key: str) -> None:
    found: list[dict[str, str]] = [ALIKE | {"host": f"n{rank}"} for rank in range(4)]
    world.refuse_odd(found)
    found[2][key] = "y"
    with pytest.raises(JobError) as refused:
        world.refuse_odd(found)
    assert f"rank 2 on host n2 has {key} y, 3 ranks have x" in str(refused.value)
    assert str(refused.value).count("on host") == 1
