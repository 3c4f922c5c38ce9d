"""The ranks of this machine, and the folder in which they and whoever started them meet.

torchrun is given one attempt and nothing else to decide (`--max-restarts 0`, static rendezvous): it turns every exit
status into 1 and starts ranks in sessions of their own, where a kill of its process group does not reach them. So each
rank leaves notes in the folder (see toolkit/rank.py), and whatever is still alive at the end is found and killed here.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from toolkit import pulse, stacks
from toolkit.attempt import Death, Look, Note, Where
from toolkit.console import write_all
from toolkit.oom import OomWatch
from toolkit.process import die_with_parent, is_gone
from toolkit.rank import ATTEMPT_DIR, LOCK
from toolkit.signals import STOPPING

_PREFIX = "toolkit-attempt-"
_END_S = 30.0  # how long a killed process may take to end
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Meeting(NamedTuple):
    """Where the ranks of all nodes meet, and which node of how many this is."""

    address: str = "127.0.0.1"
    port: int | None = None  # None: one that is free here
    nodes: int = 1
    node: int = 0
    interface: str | None = None  # the network that leads there; None: this machine's own


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one attempt, which goes afterwards; those of starters that were killed go now.

    Whoever holds the lock of the file in it is alive, be it in another container.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # another's, or going already
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, open(Path(name) / LOCK, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield Path(name)


class Node:
    """The ranks of this machine: an `Attempt` if they are all there are, else one node's part of one."""

    def __init__(self, folder: Path, processes: int, meeting: Meeting | None = None, console: bool = True) -> None:
        self.folder, self.processes, self.console = folder, processes, console
        self.meeting = meeting or Meeting()
        self.stopping: signal.Signals | None = None
        self._told = set[int]()
        self._memory = OomWatch()

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """`toolkit WORDS` on every rank of this node. What rank 0 says goes to its log, with `console` to stdout."""
        world_size = self.processes * self.meeting.nodes
        torchrun = [
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(self.meeting.nodes), "--node-rank", str(self.meeting.node),
            "--nproc-per-node", str(self.processes), "--max-restarts", "0", "--log-dir", str(self.folder),
            "--master-addr", self.meeting.address, "--master-port", str(self.meeting.port or free_port()),
            "--signals-to-handle", "SIGQUIT", "-m", "toolkit", *words,
        ]  # fmt: skip
        asked = {ATTEMPT_DIR: str(self.folder), "TOOLKIT_WORLD_SIZE": str(world_size)}
        with open(self.folder / "torchrun.log", "wb") as log:
            self.torchrun = subprocess.Popen(
                torchrun,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._defaults() | dict(environment) | asked,
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
                preexec_fn=partial(_as_torchrun, os.getpid()),  # noqa: PLW1509 - of one thread, it cannot deadlock
            )
        self._pump = threading.Thread(
            target=self._pass_on, args=[self.torchrun.stdout], name="toolkit-console", daemon=True
        )
        self._pump.start()

    def _defaults(self) -> dict[str, str]:
        """What the environment says unless the user has said otherwise."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.processes) if hasattr(os, "sched_getaffinity") else 1
        defaults = {
            "OMP_NUM_THREADS": str(threads),  # the number of threads changes sums, so it is part of the plan
            # NCCL's flight recorder: the last collectives of every rank, written when asked for through a pipe.
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_FR_DUMP_TEMP_FILE": str(self.folder / "nccl-trace-rank-"),
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(self.folder / "nccl-pipe-rank-"),
        }
        if self.meeting.interface:
            defaults["GLOO_SOCKET_IFNAME"] = self.meeting.interface
        elif sys.platform == "linux":
            # Or gloo looks up this machine's name, which a container may not know.
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        if sys.stdout.isatty():  # rank 0 writes into a pipe, and need not know
            width, height = shutil.get_terminal_size()
            defaults |= {"TTY_COMPATIBLE": "1", "COLUMNS": str(width), "LINES": str(height)}
        return defaults

    def _pass_on(self, source: Any) -> None:
        """Until torchrun and rank 0 are gone: what comes out of them to the console and, without colours, to a log."""
        console: int | None = 1 if self.console else None
        with open(self.folder / "rank-0.log", "ab", buffering=0) as log:
            while content := os.read(source.fileno(), 1 << 16):
                if console is not None:
                    try:
                        write_all(console, content)
                    except OSError:  # whoever read it has gone; training goes on
                        console = None
                with contextlib.suppress(OSError):  # a full disk keeps nobody from speaking
                    log.write(_ESCAPES.sub(b"", content))
        source.close()

    def look(self) -> Look:
        """What can be seen now; ranks that have appeared since the last look learn of a stop."""
        torchrun = self.torchrun.poll()  # before looking at the ranks, whose last words may come now
        notes = self._notes()
        self._memory.look(note["pid"] for note in notes.values())
        if self.stopping:
            for rank in notes.keys() - self._told:
                self._signal(notes[rank], self.stopping)
                self._told.add(rank)
        gone = [rank for rank, note in notes.items() if is_gone(note["pid"])]
        notes |= self._notes()  # what it left before it went
        silent = [rank for rank in gone if "exit" not in notes[rank]]
        found = {rank: pulse.read(str(self.folder / f"rank-{rank}.pulse")) for rank in notes}
        return Look(notes, {rank: beat for rank, beat in found.items() if beat}, silent, [torchrun])

    def _notes(self) -> dict[int, Note]:
        """What each rank that has started has left: `pid`, and at its end `exit`, `message`, `time_s`, `blamed`."""
        paths, host = self.folder.glob("rank-*.json"), {"host": socket.gethostname()}
        return {int(path.stem[5:]): json.loads(path.read_text()) | host for path in paths}

    def stop(self, number: signal.Signals) -> None:
        """Send every rank a signal once, also one that has yet to start: at the next look."""
        self.stopping = number

    @staticmethod
    def _signal(note: Note, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(note["pid"], number)

    def death(self, rank: int, patience_s: float = 5.0) -> Death:
        """Of what a rank died that has left no word: its parent, torchrun, knows, unless that was killed itself.

        The others, which are lost without it, are killed: torchrun waits for their end before it speaks.
        """
        notes = self._notes()
        found = re.compile(rf"exitcode:? *:? (-?\d+)\)?.*\(pid: {notes[rank]['pid']}\)")
        deadline_s = time.monotonic() + patience_s
        while True:
            ended = self.torchrun.poll()
            if ended is not None and ended < 0:  # which may be seen a moment after the ranks have followed it
                return Death(-ended, self._memory.verdict(self.torchrun.pid), self.torchrun.pid)
            if (match := found.search(self.said_by_torchrun())) or ended is not None or time.monotonic() > deadline_s:
                break
            for other, note in notes.items():
                if other != rank and not is_gone(note["pid"]):
                    self._signal(note, signal.SIGKILL)
            time.sleep(0.02)
        status = int(match[1]) if match else None
        if status is not None and status >= 0:
            return Death(None, exit=status)
        number = -status if status else None
        evidence = self._memory.verdict(notes[rank]["pid"]) if number in (None, signal.SIGKILL) else None
        return Death(number, evidence)

    def where(self) -> dict[int, Where]:
        """Have every rank write its stacks to its log, stopped ones too, and say where each of them is."""
        return stacks.where(self.folder, self._notes())

    def said_by_torchrun(self) -> str:
        """What torchrun has said."""
        return (self.folder / "torchrun.log").read_text(errors="replace")

    def end(self) -> list[str]:
        """Kill whatever is left below this process. Returns, in words, what even so does not end: it is in the kernel's
        hands, waiting for a disk or device.
        """
        deadline_s = time.monotonic() + _END_S
        while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline_s:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=5)
        self.torchrun.poll()
        self._pump.join(5)
        return [f"process {child.pid} on {socket.gethostname()}" for child in children]


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def _as_torchrun(parent: int) -> None:
    """Before torchrun begins: it dies with its parent, and hears no signal that is meant for the ranks, who save and
    leave by themselves; a scheduler sends such to every process it knows.
    """
    for number in (*STOPPING, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)
