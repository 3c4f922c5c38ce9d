"""What the jobs of a run must know of each other: which nodes failed, how often nothing came of a new start."""

import json
from contextlib import suppress
from typing import Any

from toolkit import storage
from toolkit.run import Run


class Memory:
    """nodes.json in the run. What cannot be read or written is forgotten: training does not depend on it.

    How often a job was queued again counts within that job, `job_id`; nodes that have failed are known to all.
    """

    def __init__(self, run: Run, job_id: str) -> None:
        self.run = run
        known: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            known = json.loads(storage.read(run.at("nodes.json")))
        self.failures = {str(host): int(count) for host, count in known.get("failures", {}).items()}
        self._last: list[Any] = known.get("last") or []
        ours = known.get("job") == job_id
        self._known = {"job": job_id, "requeues": known.get("requeues", 0) if ours else 0}
        self._known["checkpoint"] = known.get("checkpoint") if ours else None

    def failed(self, host: str) -> int:
        """Note a failure of a node. Returns how many it has had in this run."""
        self.failures[host] = self.failures.get(host, 0) + 1
        self._write()
        return self.failures[host]

    def elsewhere(self, what: str, saved_step: int | None, host: str) -> str:
        """Note what has failed on a node. Returns the node on which the very same had failed the last time, with no
        new checkpoint since, if that was another: then it is no fault of either, and neither is charged with it.
        """
        last, self._last = self._last, [what, saved_step, host]
        other = str(last[2]) if last[:2] == self._last[:2] and last[2] != host else ""
        if other and self.failures.get(other):
            self.failures[other] -= 1
        self._write()
        return other

    def requeued(self) -> int:
        """Note that the job is queued again. Returns how often it was since there is a new checkpoint."""
        newest: int | None = None
        with suppress(OSError):
            newest = self.run.newest_checkpoint()
        count = int(self._known["requeues"]) + 1 if newest == self._known["checkpoint"] else 1
        self._known |= {"requeues": count, "checkpoint": newest}
        self._write()
        return count

    def _write(self) -> None:
        told = {"failures": self.failures, "last": self._last, **self._known}
        with suppress(OSError):
            storage.write(self.run.at("nodes.json"), (json.dumps(told) + "\n").encode(), durable=False)
