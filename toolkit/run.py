"""The directory of one run: its job, provenance, status and metrics.

Everything about a run is found from its URL (law 1).
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from toolkit import pulse, storage
from toolkit.drift import changed, moved
from toolkit.errors import JobError
from toolkit.journal import Journal
from toolkit.lock import Lock
from toolkit.provenance import packages, without_secrets

# Of what is known of a process, what tells it from others.
WHO = ("host", "pid", "pid_namespace", "boot_id", "slurm_job_id", "slurm_restart_count")

# Requests: for a checkpoint, for an end as by SIGTERM, and for one after which no scheduler starts the run again.
SAVE_NOW, STOP, CANCEL = "save-now", "stop", "cancel"
COMPLETE = "This run is complete: raise train.epochs to go on, or start over with --fresh."


class Run:
    """One run directory, local or remote. Only rank 0 writes, and only while it holds the lock.

    What changes all the time (status.json, a remote metrics.jsonl) is written by the lock's thread, at each heartbeat:
    a slow or broken store does not hold up the loop.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.metrics = Journal(storage.join(url, "metrics.jsonl"))
        self.lock: Lock | None = None
        self.wishes: frozenset[str] = frozenset()  # requests that others have left, such as save-now
        self._unwritten: str | None = None
        self._status: dict[str, Any] = {}
        self._storing = threading.Lock()

    @property
    def problem(self) -> str | None:
        """What could not be written, or nothing."""
        return (self.lock.problem if self.lock else None) or self._unwritten

    @property
    def lost(self) -> bool:
        """Whether another attempt has taken over, whose all of this is now."""
        return self.lock is not None and self.lock.was_taken()

    def at(self, *names: str) -> str:
        """The URL of something in this run."""
        return storage.join(self.url, *names)

    def status(self) -> dict[str, Any] | None:
        """What status.json says, or None before the first start."""
        status: dict[str, Any] | None = _json(self.at("status.json"))
        return status

    def provenance(self) -> dict[str, Any]:
        """The job this directory was made for, as plain values, what `auto` meant, and each start; {} for a new one."""
        return _json(self.at("provenance.json")) or {}

    def open(
        self,
        config_text: str,
        job: dict[str, Any],
        resolved: Mapping[str, Any],
        started_with: Sequence[str],
        machine: Mapping[str, Any],
        say: Callable[[str], None] = lambda words: None,
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Take the lock, write the job and where it comes from, before step 1. Returns the number of this attempt.

        `resolved` is what `auto` means here, by key, and `data` what is known of the training set. Raises JobError if
        the directory belongs to another job or other data, or is being written to.
        """
        self.refuse_drift(job, resolved, data)
        identity = {key: machine.get(key) for key in WHO}
        self.lock = Lock(self.at("lock"), identity, self._beat)
        try:
            attempt = self.lock.claim(len(self.provenance().get("attempts", [])) + 1, say)
            self.refuse_drift(job, resolved, data)  # again: before we had the lock, another may have begun here
            if note := self.lock.note():
                say(note)
            provenance = self.provenance() or {"attempts": []}
            words = [without_secrets(word) for word in started_with]
            start = {"attempt": attempt, "started_at": _now(), "command": words}
            provenance |= {
                "job": job,
                "resolved": dict(resolved),
                "data": dict(data or {}),
                "attempts": [*provenance["attempts"], start | dict(machine) | {"packages": packages()}],
            }
            storage.write(self.at("config.yaml"), config_text.encode())
            storage.write(self.at("provenance.json"), _text(provenance))
            self._drop_late_wishes()
        except OSError as error:
            self.lock.release()
            where = storage.shown(self.url)
            raise JobError(f"run.dir {where} cannot be written: {error}; choose another run.dir") from error
        except JobError:
            self.lock.release()
            raise
        told = ("boot_id", "host", "hosts", "slurm_job_id")
        self._status = {"attempt": attempt, "pid": os.getpid()} | {key: machine.get(key) for key in told}
        return attempt

    def _drop_late_wishes(self) -> None:
        """Requests that have come too late for the attempt before are not meant for this one."""
        state = (self.status() or {}).get("state")
        if state in ("completed", "preempted", "cancelled"):
            self.granted(STOP)
        if state in ("completed", "cancelled"):
            self.granted(CANCEL)

    def refuse_drift(
        self, job: Mapping[str, Any], resolved: Mapping[str, Any], data: Mapping[str, Any] | None = None
    ) -> None:
        """Raises JobError that lists, old beside new, what makes this another job than the directory's, or other data.

        A run that is older than one of the keys goes on.
        """
        provenance = self.provenance()
        if "job" not in provenance:
            return
        where, meant = storage.shown(self.url), moved(provenance.get("resolved", {}), resolved)
        lines = changed(provenance["job"], job) + [f"{line} (what auto means on this machine)" for line in meant]
        if lines:
            raise JobError(
                f"{where} holds a run of another job:\n" + "\n".join(f"  {line}" for line in lines) +
                f"\nput the old values back; or go on from one of its checkpoints in a new run: toolkit fork {where} "
                f"--at STEP KEY=VALUE; or take only its weights: run.init_from={where} with another run.dir; or start "
                "over with --fresh"
            )  # fmt: skip
        if lines := moved(provenance.get("data", {}), data or {}):
            raise JobError(
                f"{where} holds a run on other data than data.train has now:\n" + "\n".join(f"  {ln}" for ln in lines) +
                f"\nput the data back as they were; or go on with these in a new run: toolkit fork {where} --at last; "
                "or start over with --fresh"
            )  # fmt: skip

    def begin_from(self, other: "Run", step: int, config_text: str, job: dict[str, Any]) -> None:
        """Be a new run that goes on from a step of another: with its metrics up to there, and a job of its own."""
        lines = [line for line in other.metrics.read() if line["step"] <= step]
        storage.write(self.at("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())
        storage.write(self.at("config.yaml"), config_text.encode())
        origin = {"run": storage.shown(other.url), "step": step}
        resolved = other.provenance().get("resolved", {})
        provenance = {"job": job, "resolved": resolved, "forked_from": origin, "attempts": []}
        storage.write(self.at("provenance.json"), _text(provenance))

    def completed(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The status of a run that has already done all that `job`, as plain values, asks for; else None."""
        status, written = self.status(), self.provenance().get("job")
        if not status or not written or status["state"] != "completed":
            return None
        same_end = all(written["train"][key] == job["train"][key] for key in ("epochs", "max_steps"))
        return status if same_end and not changed(written, job) else None

    def progress(self, **values: Any) -> None:
        """What the next heartbeat will write into status.json. Costs nothing, so that it can be said at every step."""
        self._status = self._status | {"heartbeat": _now(), **values}  # a new one: the lock's thread may be reading it

    def set_status(self, state: str, **values: Any) -> None:
        """Replace status.json now: what is not named stays. Nothing is written once another attempt has taken over."""
        self.progress(state=state, **values)
        if self.lost:
            return
        with self._storing:
            storage.write(self.at("status.json"), _text(self._status))

    def mark(self, state: str, **values: Any) -> None:
        """Change status.json for a run whose own rank 0 cannot: not yet, or no longer."""
        self._status = self.status() or {}
        self._status |= {"state": state, **values}
        storage.write(self.at("status.json"), _text(self._status))

    def newest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint that has a manifest, whatever its files are like."""
        url = self.at("checkpoints")
        steps = sorted((name for name in storage.names(url) if name.startswith("step-")), reverse=True)
        return next((int(name[5:]) for name in steps if storage.exists(storage.join(url, name, "manifest.json"))), None)

    def ask(self, wish: str) -> None:
        """Leave a request for whoever trains here."""
        storage.write(self.at("requests", wish), b"")

    def wished(self, *wishes: str) -> bool:
        """Whether somebody has left one of these requests, as of the last heartbeat."""
        return not self.wishes.isdisjoint(wishes)

    def granted(self, wish: str) -> None:
        """Take a request away."""
        storage.remove(self.at("requests", wish))
        self.wishes -= {wish}

    def close(self) -> None:
        """Let go of everything. A store that does not answer any more has been complained of already.

        Where another attempt has taken over, the remote copy of the metrics is its own.
        """
        with suppress(OSError):
            self.metrics.close(upload=not self.lost)
        if self.lock:
            with suppress(OSError):  # then the next start sees that the heartbeat has stopped
                self.lock.release()

    def _beat(self) -> None:
        """At each heartbeat of the lock, in its thread."""
        try:
            with self._storing:
                if self._status.get("state") == "running":  # an end that has been said must not be unsaid
                    now = self._status | {"phase": pulse.last().phase}
                    storage.write(self.at("status.json"), _text(now), durable=False)
            if self.metrics.overdue:
                self.metrics.upload()
            self.wishes = frozenset(storage.names(self.at("requests")))
        except OSError as error:
            self._unwritten = str(error)
        else:
            self._unwritten = self.metrics.problem


def fresh_url(url: str) -> str:
    """The first of url-2, url-3, … that does not exist; the URL itself if it doesn't."""
    number, free = 2, url.rstrip("/")
    while storage.exists(free):
        number, free = number + 1, f"{url.rstrip('/')}-{number}"
    return free


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _json(url: str) -> Any:
    try:
        found = json.loads(storage.read(url))
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}, not an object with keys")
        return found
    except FileNotFoundError:
        return None
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise JobError(f"{storage.shown(url)} cannot be read ({error}); choose another run.dir") from error
    except ValueError as error:
        raise JobError(
            f"{storage.shown(url)} is damaged ({error}); remove it, or start a new run with --fresh"
        ) from error


def _text(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()
