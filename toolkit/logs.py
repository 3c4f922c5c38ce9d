"""What the ranks of an attempt say, kept in the run: logs/attempt-N-rank-R.log, growing while they run."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from toolkit import storage
from toolkit.errors import JobError
from toolkit.run import Run

LOCAL_S, REMOTE_S = 1.0, 30.0  # between two copies


class KeptLogs:
    """Copies the logs in an attempt's folder into the run, in a thread of its own: a store that is away holds up
    nobody. `keep` and `finish` are called by one thread.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.period_s = LOCAL_S if storage.local_path(run.url) else REMOTE_S
        self.number: int | None = None
        self._sizes: dict[str, int] = {}
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
        """Copy all that is there, as that attempt's. A store that is away is only complained of."""
        if self._thread:
            self._thread.join()
        self.number = number
        self._copy()

    def _copy_as(self, number: Callable[[], int | None]) -> None:
        try:
            self.number = self.number or number()
        except (OSError, JobError):
            return  # the next time
        if self.number:
            self._copy(complain=False)

    def _copy(self, complain: bool = True) -> None:
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("nccl-trace-*")]):
            before = self._sizes.get(path.name, 0)
            if path.stat().st_size == before:
                continue
            try:
                size = self._bring(path, before, self.run.at("logs", f"attempt-{self.number}-{path.name}"))
            except OSError as error:
                if complain:
                    print(f"WARNING: {error}", file=sys.stderr, flush=True)
                return
            self._sizes[path.name] = size

    @staticmethod
    def _bring(path: Path, before: int, url: str) -> int:
        """Append what is new to a local file; put the whole elsewhere. Returns how much there is."""
        local = storage.local_path(url)
        with open(path, "rb") as file:
            if local is None:
                storage.write(url, content := file.read(), durable=False)
                return len(content)
            file.seek(before)
            os.makedirs(os.path.dirname(local), exist_ok=True)
            with open(local, "ab" if before else "wb") as copy:
                return before + copy.write(file.read())
