"""Several ranks on this machine: start them through torchrun, watch them, end all when one dies, say why. Never imports
torch.

torchrun is given one attempt and nothing else to decide (`--max-restarts 0`, static rendezvous): it turns every exit
status into 1 and starts ranks in sessions of their own, where a kill of its process group does not reach them. So each
rank leaves a note in the attempt's folder (its pid; at the end its exit status and message), and whatever is still
alive at the end is found and killed here.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from toolkit import storage
from toolkit.config import Job
from toolkit.run import COMPLETE, Run
from toolkit.signals import StopSignals, hold_back

ATTEMPT_DIR = "TOOLKIT_ATTEMPT_DIR"
_POLL_S = 0.1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def supervise(job: Job, words: Sequence[str], processes: int, environment: Mapping[str, str]) -> int:
    """Run `toolkit WORDS` on that many ranks and return the run's exit status. No process of it is left behind."""
    job.check_ranks(processes)
    if done := Run(job.run.dir).completed(job.as_written()):
        print(f"{done['summary']}\n{COMPLETE}")
        return 0
    signals = StopSignals().listen()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of a dead torchrun become our children, where they can be found
    with tempfile.TemporaryDirectory(prefix="toolkit-attempt-") as folder:
        attempt = Attempt(Path(folder), processes)
        try:
            attempt.start(words, environment)
            attempt.wait(signals)
        finally:
            _kill_descendants()
        status, message = attempt.verdict()
        _keep_logs(attempt, job.run.dir, status, message)
    if message:
        print(message, file=sys.stderr)
    return status


class Attempt:
    """One start of all ranks."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.dead: list[int] = []

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // self.processes) if hasattr(os, "sched_getaffinity") else 1
        defaults = {"OMP_NUM_THREADS": str(threads)}  # the number of threads changes sums, so it is part of the plan
        if sys.platform == "linux":
            # Or gloo looks up this machine's name, which a container may not know.
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--node-rank", "0",
            "--nproc-per-node", str(self.processes), "--max-restarts", "0", "--log-dir", str(self.folder),
            "--master-addr", "127.0.0.1", "--master-port", str(_free_port()),
            "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "-m", "toolkit", *words,
        ]  # fmt: skip
        with open(self.folder / "torchrun.log", "wb") as log:
            self.torchrun = subprocess.Popen(
                torchrun,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=defaults | dict(environment) | {ATTEMPT_DIR: str(self.folder)},
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - there is one thread here, so it cannot deadlock
            )

    def wait(self, signals: StopSignals) -> None:
        """Until torchrun is done or a rank has died without a word. A stop request is passed on once to every rank."""
        passed_on: set[int] = set()
        while self.torchrun.poll() is None and not self.dead:
            notes = self.notes()
            if signals.wanted():
                for rank, note in notes.items():
                    if rank not in passed_on and "exit" not in note:
                        passed_on.add(rank)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(note["pid"], signal.SIGTERM)
            gone = [rank for rank, note in notes.items() if _gone(note["pid"])]
            self.dead = [rank for rank in gone if "exit" not in self.notes()[rank]]  # what it left before it went
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.torchrun.wait(_POLL_S)

    def notes(self) -> dict[int, dict[str, Any]]:
        """What each rank that has started has left: `pid`, and at its end `exit`, `message`, `time_s`."""
        return {int(path.stem[5:]): json.loads(path.read_text()) for path in self.folder.glob("rank-*.json")}

    def verdict(self) -> tuple[int, str]:
        """(exit status, message). A rank that died silently comes first, then the first that failed in words."""
        notes = self.notes()
        self.dead = self.dead or [rank for rank, note in notes.items() if "exit" not in note]
        if self.dead:
            rank = self.dead[0]
            who = f"rank {rank} (pid {notes[rank]['pid']})"
            if (self.torchrun.returncode or 0) < 0:  # then the ranks have only followed it
                who = f"torchrun (pid {self.torchrun.pid})"
            fate = f"was killed or crashed, so all {self.processes} ranks were ended; was it out of memory?"
            return 1, f"{who} {fate}"
        failed = sorted((note["time_s"], rank) for rank, note in notes.items() if note["exit"] not in (0, 75))
        if failed:
            rank = failed[0][1]
            note = notes[rank]
            return note["exit"], note["message"] if note["exit"] == 2 else f"rank {rank}: {note['message']}"
        if len(notes) == self.processes:
            return max(note["exit"] for note in notes.values()), ""
        tail = (self.folder / "torchrun.log").read_text(errors="replace")[-2000:]
        return 1, f"only {len(notes)} of {self.processes} ranks started; torchrun said:\n{tail}"


def enter_rank(environment: Mapping[str, str]) -> None:
    """The rank's side: leave a note, die with torchrun, let rank 0 alone have the console.

    Does nothing outside a supervisor.
    """
    if ATTEMPT_DIR not in environment:
        return
    _die_with_parent()
    hold_back()
    rank = int(environment["RANK"])
    _write_note(environment, {"pid": os.getpid()})
    sys.stdout.flush()
    if rank == 0:
        os.dup2(1, 2)
    else:
        log = os.open(
            Path(environment[ATTEMPT_DIR]) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def leave_rank(environment: Mapping[str, str], status: int, message: str) -> int:
    """Note how this rank ended. Returns the status for torchrun, to which a rank that stopped early is a success."""
    if ATTEMPT_DIR not in environment:
        return status
    _write_note(environment, {"pid": os.getpid(), "exit": status, "message": message, "time_s": time.time()})
    return 0 if status == 75 else status


def _write_note(environment: Mapping[str, str], note: Mapping[str, Any]) -> None:
    path = Path(environment[ATTEMPT_DIR]) / f"rank-{environment['RANK']}.json"
    path.with_suffix(".new").write_text(json.dumps(note))
    path.with_suffix(".new").replace(path)


def _keep_logs(attempt: Attempt, run_url: str, status: int, message: str) -> None:
    """Logs go to the run if it was begun, and is still ours; one that failed is told which rank was first."""
    run, leader = Run(run_url), attempt.notes().get(0)
    number = run.attempt_of(leader["pid"]) if leader else None
    found = run.status()
    if status == 2 or number is None or found is None:
        return
    for path in sorted(attempt.folder.glob("*.log")):
        storage.write(run.at("logs", f"attempt-{number}-{path.name}"), path.read_bytes(), durable=False)
    if status == 1 and found["state"] in ("running", "failed"):  # rank 0 may have seen only that another was gone
        run.failed(message)


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill_descendants() -> None:
    """Kill whatever is left below this process, until nothing is."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
