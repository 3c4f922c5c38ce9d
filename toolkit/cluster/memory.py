"""What the jobs of a run must know of each other: which nodes failed, how often nothing came of a new start."""

import json
from contextlib import suppress
from typing import Any

from toolkit import storage
from toolkit.run import Run


class Memory:
    """nodes.json in the run. What cannot be read or written is forgotten: training does not depend on it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        known: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            known = json.loads(storage.read(run.at("nodes.json")))
        self.failures = {str(host): int(count) for host, count in known.get("failures", {}).items()}
        self._requeues, self._checkpoint = int(known.get("requeues", 0)), known.get("checkpoint")

    def failed(self, host: str) -> int:
        """Note a failure of a node. Returns how many it has had in this run."""
        self.failures[host] = self.failures.get(host, 0) + 1
        self._write()
        return self.failures[host]

    def requeued(self) -> int:
        """Note that the job is queued again. Returns how often it was since there is a new checkpoint."""
        newest: int | None = None
        with suppress(OSError):
            newest = self.run.newest_checkpoint()
        self._requeues = self._requeues + 1 if newest == self._checkpoint else 1
        self._checkpoint = newest
        self._write()
        return self._requeues

    def _write(self) -> None:
        told = {"failures": self.failures, "requeues": self._requeues, "checkpoint": self._checkpoint}
        with suppress(OSError):
            storage.write(self.run.at("nodes.json"), (json.dumps(told) + "\n").encode(), durable=False)
