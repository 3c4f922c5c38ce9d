"""What the ranks of an attempt say, kept in the run: logs/attempt-N-rank-R.log, growing while they run."""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from toolkit import storage
from toolkit.console import say
from toolkit.errors import JobError
from toolkit.run import Run

LOCAL_S, REMOTE_S = 1.0, 30.0  # between two copies
FINISH_S = 10.0  # for the last copy, which the next start of the ranks waits for
MIB = 1 << 20
WHILE_RUNNING, AT_THE_END = 1 * MIB, 16 * MIB  # of one log, to a store where nothing can be appended; the last ones
_AT_ONCE = 8  # logs on their way to a store


class KeptLogs:
    """Copies the logs in an attempt's folder into the run, in threads of their own: a store that is away holds up
    nobody. `keep` and `finish` are called by one thread.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.local = storage.local_path(run.url) is not None
        self.period_s = LOCAL_S if self.local else REMOTE_S
        self.number: int | None = None
        self._sizes: dict[str, int] = {}  # how much of a log is there, by its name
        self._cut: set[str] = set()  # those that may have more in the end
        self._thread: threading.Thread | None = None
        self._next_s = time.monotonic() + self.period_s

    def keep(self, number: Callable[[], int | None]) -> None:
        """Copy what has grown, if it is time. `number`, of the attempt, is asked for until it is known."""
        if time.monotonic() < self._next_s or (self._thread and self._thread.is_alive()):
            return
        self._next_s = time.monotonic() + self.period_s
        self._thread = threading.Thread(target=self._copy_as, args=[number], name="toolkit-logs", daemon=True)
        self._thread.start()

    def finish(self, number: int) -> None:
        """Copy all that is there, as that attempt's, within FINISH_S. What is missing then, as if the store is away,
        is only complained of.
        """
        deadline_s = time.monotonic() + FINISH_S
        if self._thread:
            self._thread.join(FINISH_S)
        self.number = number
        self._copy(AT_THE_END, deadline_s)

    def _copy_as(self, number: Callable[[], int | None]) -> None:
        try:
            self.number = self.number or number()
        except (OSError, JobError):
            return  # the next time
        if self.number:
            self._copy(WHILE_RUNNING)

    def _copy(self, most: int, deadline_s: float | None = None) -> None:
        """Bring all that has grown; what is not there by a deadline is complained of."""
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("nccl-trace-*")])
        again = self._cut if most == AT_THE_END else ()
        grown = deque(
            path for path in paths if path.name in again or path.stat().st_size != self._sizes.get(path.name, 0)
        )
        missing, errors = {path.name for path in grown}, list[OSError]()

        def bring() -> None:
            try:
                while not errors:
                    path = grown.popleft()
                    self._sizes[path.name] = self._bring(path, most)
                    missing.discard(path.name)
            except IndexError:
                return  # none is left
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=bring, daemon=True) for _ in range(1 if self.local else _AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        if missing and deadline_s is not None:
            grown.clear()
            why = errors[0] if errors else f"{FINISH_S:.0f} s were not enough"
            where = storage.shown(self.run.at("logs"))
            words = f"WARNING: {len(missing)} of {len(paths)} logs are not all in {where}: {why}"
            say(words, error=True)

    def _bring(self, path: Path, most: int) -> int:
        """Append what is new to a local file; put the last bytes elsewhere. Returns how much of it is there."""
        url = self.run.at("logs", f"attempt-{self.number}-{path.name}")
        local, before = storage.local_path(url), self._sizes.get(path.name, 0)
        with open(path, "rb") as file:
            if local is None:
                size = os.fstat(file.fileno()).st_size
                cut = max(0, size - most) if path.suffix == ".log" else 0
                file.seek(cut)
                content = file.read(size - cut)
                storage.write(url, _LEFT_OUT % cut + content if cut else content, durable=False)
                self._cut |= {path.name} if cut else set()
                return size
            file.seek(before)
            os.makedirs(os.path.dirname(local), exist_ok=True)
            with open(local, "ab" if before else "wb") as copy:
                return before + copy.write(file.read())


_LEFT_OUT = b"[the first %d bytes are left out here]\n"


def left_out(begin: bytes) -> tuple[int, int]:
    """(bytes of a log that its copy leaves out, length of the line that says so), by how the copy begins."""
    match = re.match(rb"\[the first (\d+) bytes are left out here\]\n", begin)
    return (int(match[1]), match.end()) if match else (0, 0)
