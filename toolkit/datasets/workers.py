"""Loader workers: processes that read ahead, which start for certain, hand on what they read or die of it, and do not
outlive their rank.
"""

import atexit
import ctypes
import multiprocessing.queues
import os
import select
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from toolkit.errors import JobError, RunError

_START_S, _TRIES = 10.0, 3  # how long a worker may take to start, and how often it is tried
_AHEAD, _IN_USE = 2, 3  # steps: each worker reads ahead; are taken, being taken, and on their way to the device
_SHARED = "/dev/shm"  # noqa: S108 - where torch hands tensors on, one file each


def steps_held(workers: int) -> int:
    """How many steps such workers of a rank keep in shared memory at most."""
    return _AHEAD * workers + _IN_USE


def refuse_small_memory(sizes: Iterable[int], workers: int, ranks: int) -> None:
    """Raises JobError if what the workers of this machine's ranks read ahead has no room in its shared memory.

    `sizes` are those of the tensors that they keep there for one rank, in bytes.
    """
    if not os.path.isdir(_SHARED):
        return
    facts = os.statvfs(_SHARED)
    free = facts.f_bavail * facts.f_frsize
    needed = ranks * sum(-size // facts.f_frsize * -facts.f_frsize for size in sizes)  # in whole pages
    if needed > free:
        raise JobError(
            f"data.workers={workers} hand on up to {needed / 2**20:.1f} MiB at a time through {_SHARED}, where "
            f"{free / 2**20:.1f} MiB are free; give the container more (--shm-size or --ipc=host), or set "
            "a smaller eval.batch_size or fewer workers, data.workers=0 for none"
        )


def by_workers(steps: Any, numbers: range, workers: int, pin_memory: bool) -> Iterator[Any]:
    """Each of the steps, read by worker processes.

    A fork copies every lock of this process as it is, also one that another thread holds for a moment, such as one that
    writes a checkpoint. A worker that needs it waits for ever. So those that do not start are killed, and forked again.
    """
    for _ in range(_TRIES):
        started, start = os.pipe()
        try:
            loader = DataLoader(
                steps,
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                multiprocessing_context="fork",  # the pipe goes to a child by its number
                prefetch_factor=_AHEAD,
                collate_fn=_unchanged,
                pin_memory=pin_memory,
                worker_init_fn=partial(_worker_starts, start),
                generator=torch.Generator(),  # or it would draw from the global one, and the run would drift
            )
            before = {child.pid for child in multiprocessing.active_children()}
            iterator: Iterator[Any] = iter(loader)
            if _all_say_so(started, workers):
                return iterator
            _kill_workers(child for child in multiprocessing.active_children() if child.pid not in before)
            del iterator
        finally:
            os.close(started)
            os.close(start)
    raise RunError(f"{_TRIES} times a loader worker has not started within {_START_S:.0f} s; set data.workers=0")


def _all_say_so(started: int, workers: int) -> bool:
    """Whether so many workers write a byte into the pipe in time."""
    said, deadline_s = 0, time.monotonic() + _START_S
    while said < workers and select.select([started], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        said += len(os.read(started, workers))
    return said >= workers


def _unchanged(step: Any) -> Any:
    return step


def _worker_starts(start: int, worker: int) -> None:
    """A worker leaves stopping to its rank, does not outlive it, and does not outlive a step it cannot hand on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGABRT, signal.SIG_DFL)  # no stacks: writing them beside a thread crashes at times
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_hand_on)  # type: ignore[attr-defined]
    os.write(start, b".")


def _cannot_hand_on(error: Exception, step: Any) -> None:
    """End this worker as the kernel does where a page has no room: Python would drop the step, and the rank wait for it
    for ever.
    """
    traceback.print_exception(error)
    os.kill(os.getpid(), signal.SIGBUS if "shared memory" in str(error) else signal.SIGABRT)


@atexit.register
def _end_workers() -> None:
    """End what an error has left behind: Python would send workers SIGTERM, which they ignore, and wait for ever."""
    _kill_workers(child for child in multiprocessing.active_children() if child.daemon)


def _kill_workers(workers: Iterable[Any]) -> None:
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise for a killed worker
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)
