"""Ranks over several nodes without a Slurm: a script stands in for srun, and starts all agents on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT
from tests.dist.conftest import Stage
from toolkit.cluster import step
from toolkit.cluster.agent import TOKEN
from toolkit.cluster.step import Step
from toolkit.process import is_gone

# srun FOLDER NODES: an agent on each node; ends when all have.
SRUN = """
import os, subprocess, sys, time
agents = []
for number in range(int(sys.argv[1])):
    while number and os.path.exists("keep-back"):
        time.sleep(0.05)
    slurm = {"SLURM_NODEID": str(number), "SLURM_STEP_ID": "0", "SLURMD_NODENAME": f"far{number}",
             "SLURM_LAUNCH_NODE_IPADDR": sys.argv[2]}
    agents.append(subprocess.Popen([sys.executable, "-m", "toolkit.cluster.agent"], env=os.environ | slurm))
sys.exit(max(agent.wait() for agent in agents))
"""
TRAIN = ["train", "digits.yaml", "schedule.name=held:cosine", "log.every_steps=1"]


def own_address() -> str:
    """By which this machine is reached from others, if there is one."""
    found = [end.address for ends in psutil.net_if_addrs().values() for end in ends if end.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")


class Started:
    """A step of two nodes with a rank each, and the thread's view of it."""

    def __init__(self, stage: Stage, monkeypatch: pytest.MonkeyPatch, paths: tuple[str, ...] = ()) -> None:
        monkeypatch.chdir(stage.folder)
        (stage.folder / "srun.py").write_text(SRUN)
        self.folder, self.stage = stage.folder / "attempt", stage
        self.folder.mkdir()
        srun = [sys.executable, "srun.py", "2", own_address()]
        self.warned: list[signal.Signals] = []
        self.step = Step(self.folder, srun, ["far0", "far1"], 1, paths, patience_s=60, warned=self.warned.append)

    def start(self, *changes: str) -> None:
        ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.stage.tmp)}
        self.step.start([*TRAIN, *changes], dict(os.environ) | ours)

    def until(self, reached: Callable[[Any], Any], what: str, timeout_s: float = 180) -> Any:
        """What can be seen once it is so."""
        deadline_s = time.monotonic() + timeout_s
        while not reached(look := self.step.look()):
            assert time.monotonic() < deadline_s, f"no {what}: {look}\n{self.step.said_by_srun()}"
            time.sleep(0.05)
        return look

    def held(self, number: int = 3) -> bool:
        return all((self.stage.folder / f"held-{number}-{rank}").exists() for rank in (0, 1))

    def agents(self) -> list[psutil.Process]:
        """By node."""
        found = [one for one in self.stage.alive() if "toolkit.cluster.agent" in one.cmdline()]
        return sorted(found, key=lambda one: one.environ().get("SLURM_NODEID", ""))


@pytest.fixture
def started(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    here = Started(stage, monkeypatch)
    yield here
    for process in stage.alive():
        if process.pid != os.getpid():
            process.resume()
    stage.release()
    here.step.end()
    monkeypatch.chdir("/")
    stage.wait_for(lambda: not stage.alive(), "end of every process", timeout_s=60)


def hold(stage: Stage, before: int = 3) -> None:
    for rank in (0, 1):
        (stage.folder / f"hold-{before}-{rank}").touch()


def test_two_nodes_with_a_rank_each_train_as_two_ranks_here(started: Started, stage: Stage, equal: Any) -> None:
    started.start("run.dir=runs/far")
    look = started.until(lambda look: look.ended, "end")
    assert [note["exit"] for _, note in sorted(look.notes.items())] == [0, 0]
    assert (started.step.end(), started.step.process.returncode) == ([], 0)
    said = (started.folder / "rank-0.log").read_text()
    assert "2 ranks on cpu" in said
    stage.run(*TRAIN, "run.dir=runs/here", "--processes", "2")
    assert equal(stage.place.tensors("runs/far", 40), stage.place.tensors("runs/here", 40))


def test_strangers_change_nothing(started: Started, stage: Stage) -> None:
    hold(stage)
    started.start()
    port = started.step.listener.getsockname()[1]
    hello = {"node": 0, "step": "0", "host": "evil", "address": "127.0.0.1", "port": 1}
    heard = []
    for content in (
        json.dumps(hello | {"token": "0" * 64}).encode() + b"\n",
        json.dumps(hello).encode() + b"\n",
        json.dumps(hello | {"token": None}).encode() + b"\n",
        json.dumps(hello | {"token": "é"}).encode() + b"\n",
        json.dumps(hello | {"token": "\ud800"}).encode() + b"\n",
        b"[" * 10**6 + b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4096) + b"\n",
        b"[1, 2]\n",
        b"{}",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as stranger:
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            heard.append(stranger.recv(100))
    assert heard == [b""] * 10
    started.until(lambda look: started.held(), "ranks before step 3")
    assert sorted(node.host for node in started.step.nodes.values()) == ["far0", "far1"]
    stage.release()
    look = started.until(lambda look: look.ended, "end")
    assert {note["exit"] for note in look.notes.values()} == {0}


def test_a_node_that_stands_still_is_lost_by_name(
    started: Started, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(stage)
    started.start()
    started.until(lambda look: started.held(), "ranks before step 3")
    monkeypatch.setattr(step, "SILENT_S", 4.0)
    monkeypatch.setattr(step, "END_S", 5.0)
    started.agents()[1].suspend()
    look = started.until(lambda look: look.lost, "loss")
    assert list(look.lost) == ["far1"]
    assert "gave no sign of life for 4 s: it is down, or cut off from the network" in look.lost["far1"]


def test_a_killed_agent_is_lost_at_once_and_its_ranks_go_with_it(started: Started, stage: Stage) -> None:
    hold(stage)
    started.start()
    look = started.until(lambda look: started.held() and len(look.notes) == 2, "ranks before step 3")
    ranks = {rank: note["pid"] for rank, note in look.notes.items()}
    assert TOKEN not in psutil.Process(ranks[1]).environ(), "ranks run the user's code"
    started.agents()[1].kill()
    look = started.until(lambda look: look.lost, "loss", step.SILENT_S - 5)
    assert "has lost its agent" in look.lost["far1"]
    stage.wait_for(lambda: is_gone(ranks[1]), "end of its rank", timeout_s=60)


def test_a_signal_to_a_node_is_told_and_a_stop_reaches_every_rank(started: Started, stage: Stage) -> None:
    hold(stage)
    started.start()
    started.until(lambda look: started.held(), "ranks before step 3")
    started.agents()[1].send_signal(signal.SIGUSR2)
    started.until(lambda look: started.warned == [signal.SIGUSR2], "warning")
    started.step.stop(signal.SIGUSR2)
    stage.wait_until_told([0, 1])
    stage.release()
    look = started.until(lambda look: look.ended, "end")
    assert {note["exit"] for note in look.notes.values()} == {75}


def test_a_node_that_does_not_see_a_folder_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Started(stage, monkeypatch, paths=(str(stage.folder), "/nowhere/to be seen"))
    here.start()
    look = here.until(lambda look: look.ended or look.notes, "word of it")
    here.step.end()
    note = look.notes[min(look.notes)]
    assert note["exit"] == 2
    assert note["message"].startswith("node far0 does not see /nowhere/to be seen; give folders that all nodes share")
    assert not (stage.folder / "runs").exists()
    monkeypatch.chdir("/")


# A supervisor of its own process, to be killed.
SUPERVISOR_OF_TWO = """
import os, sys, time
from pathlib import Path
from toolkit.cluster.step import Step
from toolkit.process import is_gone
folder = Path("attempt2")
folder.mkdir()
step = Step(folder, [sys.executable, "srun.py", "2", sys.argv[1]], ["far0", "far1"], 1, patience_s=60)
step.start(sys.argv[2:], dict(os.environ))
while True:
    time.sleep(0.1)
"""


def test_nobody_outlives_a_killed_supervisor(stage: Stage) -> None:
    (stage.folder / "srun.py").write_text(SRUN)
    stage.place.write("supervisor.py", SUPERVISOR_OF_TWO)
    hold(stage)
    process = subprocess.Popen(
        [sys.executable, "supervisor.py", own_address(), *TRAIN], cwd=stage.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(stage.tmp)},
    )  # fmt: skip
    held = lambda: all((stage.folder / f"held-3-{rank}").exists() for rank in (0, 1))  # noqa: E731
    stage.wait_for(held, "ranks before step 3")
    process.kill()
    process.wait(timeout=60)
    start_s = time.monotonic()
    stage.wait_for(lambda: not stage.alive(), "end of every process", timeout_s=60)
    print(f"nobody is left {time.monotonic() - start_s:.1f} s after the supervisor was killed")


@pytest.fixture
def half(started: Started, stage: Stage) -> Started:
    """A step of which one agent is here, and the other comes when the file keep-back goes."""
    (stage.folder / "keep-back").touch()
    started.start()
    started.until(lambda look: started.step.nodes, "first agent")
    return started


def test_an_agent_that_waits_for_others_is_not_lost(
    half: Started, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "SILENT_S", 0.5)
    met_s = half.step.nodes[0].heard_s
    look = half.until(lambda look: time.monotonic() - met_s > 1, "a second")
    assert not look.lost
    monkeypatch.setattr(step, "SILENT_S", 15.0)
    (stage.folder / "keep-back").unlink()
    look = half.until(lambda look: look.ended, "end")
    assert {note["exit"] for note in look.notes.values()} == {0}


def test_a_stop_that_comes_before_the_start_stops_every_rank(half: Started, stage: Stage) -> None:
    half.step.stop(signal.SIGTERM)
    (stage.folder / "keep-back").unlink()
    look = half.until(lambda look: look.ended, "end")
    assert [note["exit"] for note in look.notes.values()] == [75, 75]


def test_what_is_ended_before_it_has_begun_never_begins(half: Started, stage: Stage) -> None:
    started_s = time.monotonic()
    assert half.step.end() == []
    assert time.monotonic() - started_s < step.END_S, "an agent that waits was not told"
    (stage.folder / "keep-back").unlink()
    stage.wait_for(lambda: not half.agents(), "end of all agents", timeout_s=60)
    assert not (stage.folder / "runs").exists()


def test_without_srun_it_says_so(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stage.folder)
    one = Step(stage.folder, ["no-such-srun"], ["n1"], 1, patience_s=1)
    with pytest.raises(FileNotFoundError, match="no-such-srun"):
        one.start(TRAIN, {})
    assert one.end() == []
