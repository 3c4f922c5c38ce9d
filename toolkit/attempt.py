"""One start of all ranks of a run on this machine, and the folder in which they and their supervisor meet.

torchrun is given one attempt and nothing else to decide (`--max-restarts 0`, static rendezvous): it turns every exit
status into 1 and starts ranks in sessions of their own, where a kill of its process group does not reach them. So each
rank leaves a note (its pid; at the end its exit status and message) and keeps its heartbeat there, and whatever is
still alive at the end is found and killed here.

    rank-1.json  rank-1.pulse  rank-1.log  rank-1-stacks.log  torchrun.log
"""

import contextlib
import ctypes
import faulthandler
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
from typing import Any

import psutil

from toolkit import pulse
from toolkit.pulse import Pulse
from toolkit.signals import hold_back

ATTEMPT_DIR = "TOOLKIT_ATTEMPT_DIR"
SHOW_STACKS = signal.SIGQUIT  # to a rank: write down where each of your threads is
_PREFIX = "toolkit-attempt-"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_END_S = 30.0  # how long a killed process may take to end
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one attempt, which goes afterwards; those of supervisors that were killed go now.

    Whoever holds the lock of the file in it is alive, be it in another container.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/supervisor.lock"):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # another's, or going already
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, open(Path(name) / "supervisor.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield Path(name)


class Attempt:
    """The supervisor's side: start the ranks, look at them, end them."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """`toolkit WORDS` on every rank. What rank 0 says goes to this process's stdout and to its log."""
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--node-rank", "0",
            "--nproc-per-node", str(self.processes), "--max-restarts", "0", "--log-dir", str(self.folder),
            "--master-addr", "127.0.0.1", "--master-port", str(_free_port()),
            "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "-m", "toolkit", *words,
        ]  # fmt: skip
        asked = {ATTEMPT_DIR: str(self.folder), "TOOLKIT_WORLD_SIZE": str(self.processes)}
        with open(self.folder / "torchrun.log", "wb") as log:
            self.torchrun = subprocess.Popen(
                torchrun,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._defaults() | dict(environment) | asked,
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - of one thread, it cannot deadlock
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
        if sys.platform == "linux":
            # Or gloo looks up this machine's name, which a container may not know.
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        if sys.stdout.isatty():  # rank 0 writes into a pipe, and need not know
            width, height = shutil.get_terminal_size()
            defaults |= {"TTY_COMPATIBLE": "1", "COLUMNS": str(width), "LINES": str(height)}
        return defaults

    def _pass_on(self, source: Any) -> None:
        """Until torchrun and rank 0 are gone: what comes out of them to the console and, without colours, to a log."""
        sys.stdout.flush()
        console: int | None = 1
        with open(self.folder / "rank-0.log", "ab", buffering=0) as log:
            while content := os.read(source.fileno(), 1 << 16):
                if console is not None:
                    try:
                        _write_all(console, content)
                    except OSError:  # whoever read it has gone; training goes on
                        console = None
                with contextlib.suppress(OSError):  # a full disk keeps nobody from speaking
                    log.write(_ESCAPES.sub(b"", content))
        source.close()

    def notes(self) -> dict[int, dict[str, Any]]:
        """What each rank that has started has left: `pid`, and at its end `exit`, `message`, `time_s`, `blamed`."""
        return {int(path.stem[5:]): json.loads(path.read_text()) for path in self.folder.glob("rank-*.json")}

    def pulses(self) -> dict[int, Pulse]:
        """The last heartbeat of each rank that has started."""
        found = {rank: pulse.read(str(self.folder / f"rank-{rank}.pulse")) for rank in range(self.processes)}
        return {rank: beat for rank, beat in found.items() if beat}

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.notes()[rank]["pid"], number)

    def silently_gone(self) -> list[int]:
        """The ranks that have died without a word."""
        gone = [rank for rank, note in self.notes().items() if is_gone(note["pid"])]
        return [rank for rank in gone if "exit" not in self.notes()[rank]]  # what it left before it went

    def signal_that_killed(self, rank: int, patience_s: float = 5.0) -> int | None:
        """Which signal a dead rank died of, from its parent, torchrun; None if that cannot be known.

        The others, which are lost without it, are killed: torchrun waits for their end before it speaks.
        """
        for other, note in self.notes().items():
            if other != rank and not is_gone(note["pid"]):
                self.signal(other, signal.SIGKILL)
        found = re.compile(rf"exitcode:? *:? -(\d+)\)?.*\(pid: {self.notes()[rank]['pid']}\)")
        deadline_s = time.monotonic() + patience_s
        while True:
            ended = self.torchrun.poll() is not None
            if match := found.search(self.said_by_torchrun()):
                return int(match[1])
            if ended or time.monotonic() > deadline_s:
                return None
            time.sleep(0.02)

    def said_by_torchrun(self) -> str:
        return (self.folder / "torchrun.log").read_text(errors="replace")

    def end(self) -> list[int]:
        """Kill whatever is left below this process. Returns the pids of those that even so do not end: they are in the
        kernel's hands, waiting for a disk or device.
        """
        deadline_s = time.monotonic() + _END_S
        while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline_s:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=5)
        self.torchrun.poll()
        self._pump.join(5)
        return [child.pid for child in children]


def enter_rank(environment: Mapping[str, str]) -> None:
    """The rank's side: leave a note, die with torchrun, let rank 0 alone have the console, be ready to show its stacks.

    Does nothing outside a supervisor.
    """
    if ATTEMPT_DIR not in environment:
        return
    rank, folder = int(environment["RANK"]), Path(environment[ATTEMPT_DIR])
    die_with_parent()
    if os.getppid() in (1, int((folder / "supervisor.lock").read_text())):
        sys.exit(1)  # torchrun has died before that was asked for
    hold_back()
    sys.stdout.flush()
    if rank == 0:
        os.dup2(1, 2)
    else:
        log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    faulthandler.enable()  # a crash in native code says where
    stacks = open(folder / f"rank-{rank}-stacks.log", "ab", buffering=0)  # noqa: SIM115 - open for as long as the rank is
    faulthandler.register(SHOW_STACKS, stacks, all_threads=True)
    pulse.keep_in(str(folder / f"rank-{rank}.pulse"))
    _write_note(environment, {"pid": os.getpid()})


def leave_rank(environment: Mapping[str, str], status: int, message: str, blamed: int | None = None) -> int:
    """Note how this rank ended, and which one it blames for that. Returns the status for torchrun, to which a rank that
    stopped early is a success.
    """
    if ATTEMPT_DIR not in environment:
        return status
    ending = {"exit": status, "message": message, "time_s": time.time(), "blamed": blamed}
    _write_note(environment, {"pid": os.getpid()} | ending)
    return 0 if status == 75 else status


def be_subreaper() -> None:
    """Orphans of a dead torchrun become children of this process, where they can be found."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
    """The kernel sends this process a signal when its parent dies, however that comes; has `parent`, it leaves now."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it buried or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _write_note(environment: Mapping[str, str], note: Mapping[str, Any]) -> None:
    path = Path(environment[ATTEMPT_DIR]) / f"rank-{environment['RANK']}.json"
    path.with_suffix(".new").write_text(json.dumps(note))
    path.with_suffix(".new").replace(path)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
