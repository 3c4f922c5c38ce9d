"""Whoever watches the supervisor of a job: what is killed is started again, and signals arrive, whenever they come."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolkit.cluster import slurm
from toolkit.cluster.guard import KILLS, Guard

# Notes its start; then does as its first argument says.
COMMAND = """
import os, signal, sys, time
from toolkit.signals import StopSignals
with open("starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
starts = len(open("starts").readlines())
what, count = sys.argv[1], int(sys.argv[2])
if what == "die" and starts <= count:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "listen":
    while not os.path.exists("imported"):
        time.sleep(0.01)
    signals = StopSignals().listen()
    while not signals.received:
        time.sleep(0.02)
    print("told", signals.received.name, flush=True)
    sys.exit(75)
sys.exit(count if what == "exit" else 0)
"""


def guard(folder: Path, *words: object) -> "subprocess.Popen[str]":
    (folder / "command.py").write_text(COMMAND)
    command = [sys.executable, "-m", "toolkit.cluster.guard", sys.executable, "command.py", *map(str, words)]
    return subprocess.Popen(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def starts(folder: Path) -> list[int]:
    path = folder / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for_starts(folder: Path, count: int) -> None:
    deadline_s = time.monotonic() + 30
    while len(starts(folder)) < count:
        assert time.monotonic() < deadline_s, starts(folder)
        time.sleep(0.01)


def wait_until_pending(pid: int, number: signal.Signals) -> None:
    """Until a process that holds signals back has been sent one."""
    deadline_s = time.monotonic() + 30
    while not int(re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16) >> (number - 1) & 1:
        assert time.monotonic() < deadline_s, number
        time.sleep(0.01)


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_it_ends_as_its_command_ends(status: int, tmp_path: Path) -> None:
    process = guard(tmp_path, "exit", status)
    process.communicate(timeout=30)
    assert (process.returncode, len(starts(tmp_path))) == (status, 1)


def test_what_is_killed_is_started_again(tmp_path: Path) -> None:
    process = guard(tmp_path, "die", 2)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, len(starts(tmp_path))) == (0, 3)
    assert out.count("the supervisor was killed by SIGKILL; it is started again") == 2


def test_it_gives_up_on_what_is_killed_each_time(tmp_path: Path) -> None:
    process = guard(tmp_path, "die", 99)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, len(starts(tmp_path))) == (128 + signal.SIGKILL, KILLS + 1)
    assert f"the supervisor was killed by SIGKILL, the {KILLS + 1}th time in a row" in out


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_is_passed_on_though_the_command_does_not_listen_yet(number: signal.Signals, tmp_path: Path) -> None:
    process = guard(tmp_path, "listen", 0)
    wait_for_starts(tmp_path, 1)
    (command,) = starts(tmp_path)
    process.send_signal(number)
    wait_until_pending(command, number)
    (tmp_path / "imported").touch()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, f"told {number.name}\n")


def test_the_next_start_learns_of_a_signal_that_the_one_before_took_with_it(tmp_path: Path) -> None:
    process = guard(tmp_path, "listen", 0)
    wait_for_starts(tmp_path, 1)
    (killed,) = starts(tmp_path)
    process.send_signal(signal.SIGTERM)
    os.kill(killed, signal.SIGKILL)
    (tmp_path / "imported").touch()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, len(starts(tmp_path))) == (75, 2), out
    assert "told SIGTERM" in out


@pytest.mark.parametrize(
    ("state", "restarts", "cancelled"), [("RUNNING", 1, True), ("RUNNING", 2, False), ("PENDING", 2, False)]
)
def test_a_job_without_a_slurmstepd_is_ended_unless_it_is_to_be_started_again(
    state: str, restarts: int, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = slurm.JobFacts("7", "7", state, "None", True, restarts, (), (), None, "")
    asked: list[str] = []
    monkeypatch.setattr(slurm, "job_facts", lambda job, patience_s: facts)
    monkeypatch.setattr(slurm, "cancel", asked.append)
    monkeypatch.setattr("os.environ", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    guard = Guard.__new__(Guard)  # which listens to no signals
    guard.parent = os.getppid()
    guard.bury()
    assert asked == [], "its slurmstepd lives"
    guard.parent += 1
    guard.bury()
    assert asked == ["7"] * cancelled


def test_the_command_goes_with_its_guard(tmp_path: Path) -> None:
    process = guard(tmp_path, "listen", 0)
    wait_for_starts(tmp_path, 1)
    process.kill()
    process.communicate(timeout=60)  # its end of the pipe is closed only when the command is gone too


def test_a_signal_after_the_end_does_nothing_whichever_thread_it_meets() -> None:
    late = """
import os, signal, threading, time
from toolkit.signals import STOPPING, StopSignals, hold_back

hold_back()
with StopSignals().listening():
    threading.Thread(target=time.sleep, args=(0.5,)).start()  # hears signals, as threads of a store or a pool do
for number in STOPPING:
    os.kill(os.getpid(), number)
print("completed", flush=True)
"""
    command = [sys.executable, "-c", late]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "completed\n"), ended.stderr
