"""What the tests of real ranks share: a command that can be held before a step, watched, and killed as a whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone"]

# The cosine schedule is asked once a step, in the rank itself: a rank waits there while the file hold-STEP-RANK exists.
# Before, it is tried out when the job is built, at the first step, in the middle and at the last.
# While it waits, told-RANK says that a signal to stop has come.
HELD = """
import itertools
import os
import signal
import time
from pathlib import Path

from toolkit import optim

calls = itertools.count()


def cosine(step, total_steps, **args):
    rank, tried_out = os.environ.get("RANK", "0"), next(calls) < 3
    while not tried_out and Path(f"hold-{step}-{rank}").exists():
        Path(f"held-{step}-{rank}").touch()
        stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if stop and stop.received:
            Path(f"told-{rank}").touch()
        time.sleep(0.02)
    return optim.cosine(step, total_steps, **args)
"""


class Stage:
    """A workplace whose commands can be stopped at a known step and looked at from outside."""

    def __init__(self, place: Any) -> None:
        self.place, self.folder = place, place.folder
        place.write("held.py", HELD)
        self.tmp: Path = place.folder / "tmp"
        self.tmp.mkdir()

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return self.place.start(*words, TMPDIR=str(self.tmp), **environment)

    def run(self, *words: str, status: int = 0, timeout_s: float = 300, **environment: str) -> str:
        return self.place.run(*words, status=status, timeout_s=timeout_s, TMPDIR=str(self.tmp), **environment)

    def torchrun(self, processes: int, *words: str) -> str:
        """What plain `torchrun -m toolkit WORDS` says, without a supervisor of ours."""
        return self.program(processes, "-m", "toolkit", *words)

    def program(self, processes: int, *words: str) -> str:
        """What a program says on that many ranks of torchrun; on one, by itself."""
        several = ["-m", *TORCHRUN, "--nproc-per-node", str(processes)] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *several, *words],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def hold(self, *words: str, before: int, ranks: Iterable[int], **environment: str) -> "subprocess.Popen[str]":
        """`toolkit WORDS` in the background, once these ranks have done `before` steps and wait; see `release`."""
        for rank in ranks:
            (self.folder / f"hold-{before}-{rank}").touch()
            (self.folder / f"held-{before}-{rank}").unlink(missing_ok=True)
            (self.folder / f"told-{rank}").unlink(missing_ok=True)
        process = self.start(*words, **environment)
        self.wait_for(
            lambda: all((self.folder / f"held-{before}-{rank}").exists() for rank in ranks),
            f"ranks {ranks} before step {before}",
            process,
        )
        return process

    def wait_until_told(self, ranks: Iterable[int], process: "subprocess.Popen[str] | None" = None) -> None:
        """Until the signal to stop has come to these ranks, which wait: what is released before may end without it."""
        self.wait_for(
            lambda: all((self.folder / f"told-{rank}").exists() for rank in ranks), f"stop of ranks {ranks}", process
        )

    def newest_save(self, run: str) -> int:
        """The step of the newest whole checkpoint, 0 before the first."""
        manifests = (self.folder / run / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name[5:]) for path in manifests), default=0)

    def wait_for_save(self, run: str, step: int) -> None:
        """Until a checkpoint of a step, or of a later one, is whole: saves run beside the loop."""
        self.wait_for(lambda: self.newest_save(run) >= step, f"checkpoint of step {step}")

    def release(self) -> None:
        for path in self.folder.glob("hold-*"):
            path.unlink()

    def wait_for(
        self,
        condition: Callable[[], Any],
        what: str,
        process: "subprocess.Popen[str] | None" = None,
        timeout_s: float = 180,
    ) -> Any:
        """The first true value of the condition; a failure if `process` ends before there is one."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := condition()):
            if process is not None and process.poll() is not None:
                raise AssertionError(f"ended with {process.returncode} before {what}: {process.communicate()}")
            assert time.monotonic() < deadline_s, f"no {what} within {timeout_s} s"
            time.sleep(0.02)
        return value

    def end(self, process: "subprocess.Popen[str]", status: int, timeout_s: float = 180) -> tuple[str, str]:
        """(stdout, stderr) of a command that must end with this status."""
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == status, f"exit {process.returncode}, not {status}:\n{out}\n{err}"
        return out, err

    def kill_whole(self, process: "subprocess.Popen[str]") -> None:
        """kill -9 of the command and all below it, as when a machine goes away."""
        everyone = [psutil.Process(process.pid)]
        for one in everyone:  # who stands still has no more children
            one.suspend()
            everyone += one.children()
        for one in everyone:
            one.kill()
        self.end(process, -signal.SIGKILL)
        self.release()

    def notes(self) -> dict[int, dict[str, Any]]:
        """What the ranks of the command's attempt have said of themselves."""
        return {int(path.stem[5:]): json.loads(path.read_text()) for path in self.tmp.glob("*/rank-*.json")}

    def alive(self) -> list[psutil.Process]:
        """Every process that runs in this folder, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@contextlib.contextmanager
def staged(place: Any) -> Iterator[Stage]:
    """A stage on which nobody may be left at the end."""
    stage = Stage(place)
    yield stage
    left = stage.alive()
    for process in left:
        process.kill()
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def stage(workplace: Any) -> Iterator[Stage]:
    with staged(workplace) as stage:
        yield stage
