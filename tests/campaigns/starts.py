"""Starts of the `toolkit` command in a tenth of their time: forked from a process that has imported torch already.

What runs is `toolkit.cli.main` in a process of its own, which is killed, suspended and waited for like any other.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Workplace

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch", "torch._dynamo", "toolkit.session", "toolkit.cli", "toolkit.supervisor", "toolkit.datasets.digits",
    "toolkit.models.mlp", "s3fs", "tests.campaigns.starts",
]  # fmt: skip


def warm() -> None:
    """Start the process that all others are forked from, with one thread a rank so that sums are comparable."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({"OMP_NUM_THREADS": before} if before else {})


class Started:
    """A command in the background; as much of subprocess.Popen as tests use.

    `prepare(*what)` is called in the new process before the command, which may change what it will use.
    """

    def __init__(
        self,
        words: tuple[str, ...],
        folder: Path,
        environment: Mapping[str, str],
        prepare: Callable[..., None] | None = None,
        what: tuple[Any, ...] = (),
    ) -> None:
        self._output = tempfile.mkdtemp(prefix="toolkit-start-")
        weakref.finalize(self, shutil.rmtree, self._output)
        for name in ("out", "err"):
            Path(self._output, name).touch()
        given = (words, str(folder), dict(environment), self._output, prepare, what)
        self._process = CONTEXT.Process(target=_be, args=given)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(["toolkit"], timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def said(self) -> tuple[str, str]:
        """(stdout, stderr) so far."""
        out, err = (Path(self._output, name).read_text(errors="replace") for name in ("out", "err"))
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()


@dataclass
class Forked(Workplace):
    """A workplace whose commands start quickly. See `Started` for `prepare`, here with its arguments."""

    prepare: tuple[Callable[..., None], tuple[Any, ...]] | None = None

    def start(self, *words: str, **environment: str) -> Any:
        return Started(words, self.folder, environment, *(self.prepare or ()))


def _be(
    words: tuple[str, ...],
    folder: str,
    environment: Mapping[str, str],
    output: str,
    prepare: Callable[..., None] | None,
    what: tuple[Any, ...],
) -> None:
    """In the new process: the command, with stdout and stderr in files."""
    from toolkit import cli, process

    process.die_with_parent()
    tempfile.tempdir = None  # to be found in this process's own environment
    multiprocessing.set_start_method("fork", force=True)  # as it is where nobody has forked anything
    for number, name in enumerate(("out", "err"), 1):
        descriptor = os.open(Path(output, name), os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["toolkit", *words]
    if prepare:
        prepare(*what)
    try:
        cli.main()
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
        sys.stdout.flush()
        sys.stderr.flush()


class ForkedAgain:
    """In a forked command: `python -m toolkit WORDS`, by another fork; as much of subprocess.Popen as proof uses."""

    def __init__(self, words: list[str], *, stdout: Any, env: Mapping[str, str], **_: Any) -> None:
        self._process = multiprocessing.Process(target=self._be, args=(words[2:], stdout.fileno(), env))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    @staticmethod
    def _be(words: list[str], output: int, environment: Mapping[str, str]) -> None:
        from toolkit import cli

        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        try:
            cli.main()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
