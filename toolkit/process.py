"""What the kernel is asked about processes: who dies with whom, who inherits orphans, who is gone."""

import ctypes
import os
import signal
import sys

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def be_subreaper() -> None:
    """Orphans below this process, such as those of a dead torchrun, become its children, where they can be found."""
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


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
