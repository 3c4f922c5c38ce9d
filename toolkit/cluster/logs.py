"""`toolkit logs`: what a rank of a run says, attempt after attempt."""

import contextlib
import os
import re
import select
import time
from collections.abc import Callable, Iterator

from toolkit import storage
from toolkit.cluster.monitor import View, view
from toolkit.errors import JobError
from toolkit.logs import left_out

POLL_S, REMOTE_POLL_S = 0.5, 10.0
_LEAVE_S = 3.0  # after its last word in status.json a run says a little more, and its supervisor brings that in
_REST_S = 15.0  # how long a run of a scheduler must have been at rest: what squeue says may be 10 s old
_CHUNK = 1 << 20


def show(run: str, rank: int, attempt: int | None, onwards: bool) -> int:
    """As `follow`, to stdout. Returns the exit status: 130 after Ctrl-C, 0 also if nobody reads any more."""

    def write(content: bytes) -> None:
        """Past Python's buffer, which it would try to get rid of after a Ctrl-C; and never into a pipe that is full,
        where one that has come just before would wait as long.
        """
        while content:
            if select.select([], [1], [], POLL_S)[1]:
                content = content[os.write(1, content[: select.PIPE_BUF]) :]

    with contextlib.suppress(BrokenPipeError):
        try:
            follow(run, rank, attempt, onwards, write)
        except KeyboardInterrupt:
            return 130
    return 0


def follow(run: str, rank: int, attempt: int | None, onwards: bool, write: Callable[[bytes], object]) -> None:
    """Write what a rank said in one attempt, by default the newest; `onwards`, until the run is over or, if an attempt
    was named, until the next begins. Of a run that never had ranks, what the scheduler says.

    Raises JobError if nothing was said, listing what was.
    """
    seen, number, offset = view(run), attempt, 0
    active_s = time.monotonic()
    while True:
        logs = attempts_of(run, rank)
        number = number or max(logs, default=None)
        if number in logs:
            offset = _pass_on(logs[number], offset, write)
        later = min((other for other in logs if number and other > number), default=None)
        if onwards and later and not attempt:
            number, offset = later, 0
            continue
        active_s = time.monotonic() if seen.goes_on else active_s
        if not onwards or later or _is_over(seen, time.monotonic() - active_s):
            break
        time.sleep(POLL_S if storage.local_path(run) else REMOTE_POLL_S)
        seen = view(run)
    if number not in logs:
        _scheduler_said(seen, rank, attempt, write)


def _is_over(seen: View, rests_s: float) -> bool:
    """Whether a run will not go on, nor say more; one of a scheduler that is at rest may be about to start again."""
    is_final = not seen.known.job_id or seen.known.is_over
    return not seen.goes_on and rests_s > (_LEAVE_S if is_final else _REST_S)


def attempts_of(run: str, rank: int) -> dict[int, str]:
    """The logs of a rank by attempt."""
    return {attempt: url for attempt, its, url in _all(run) if its == rank}


def _all(run: str) -> Iterator[tuple[int, int, str]]:
    folder = storage.join(run, "logs")
    for name in storage.names(folder):
        if match := re.fullmatch(r"attempt-(\d+)-rank-(\d+)\.log", name):
            yield int(match[1]), int(match[2]), storage.join(folder, name)


def _pass_on(url: str, offset: int, write: Callable[[bytes], object]) -> int:
    """Write a log from an offset on. Returns where it ended. A copy in a store may have only the last of a long one."""
    if storage.local_path(url) is None and left_out(storage.read(url, 0, min(100, storage.size(url))))[0]:
        copy = storage.read(url)  # in one piece: the next one leaves out more
        cut, begins = left_out(copy)
        write(copy[begins + offset - cut :] if offset >= cut else copy)
        return max(offset, cut + len(copy) - begins)
    while content := storage.read(url, offset, min(offset + _CHUNK, max(offset, storage.size(url)))):
        write(content)
        offset += len(content)
    return offset


def _scheduler_said(seen: View, rank: int, attempt: int | None, write: Callable[[bytes], object]) -> None:
    run, log = seen.known.url, seen.known.submitted.get("log")
    if attempt or not log or any(_all(run)):
        raise JobError(_missing(run, rank, attempt))
    if not storage.exists(log):
        raise JobError(f"{storage.shown(run)} is {seen.state} and has said nothing yet; its log will be {log}")
    _pass_on(log, 0, write)


def _missing(run: str, rank: int, attempt: int | None) -> str:
    found: dict[int, list[int]] = {}
    for number, its, _ in sorted(_all(run)):
        found.setdefault(number, []).append(its)
    said = "; ".join(f"attempt {number}: ranks {', '.join(map(str, ranks))}" for number, ranks in found.items())
    what = f"no log of rank {rank}" + ("" if attempt is None else f" in attempt {attempt}")
    return f"{storage.shown(run)} has {what}; it has {said or 'none at all: one process alone speaks on its console'}"
