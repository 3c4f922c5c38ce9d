"""The directory of one run: its job, provenance, status and metrics.

Everything about a run is found from its URL (law 1).
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import storage
from toolkit.errors import JobError

# What may differ between two starts of one run. All else makes another run, whatever it is called.
MAY_CHANGE = {
    "run.dir", "run.name", "data.workers", "train.epochs", "train.max_steps", "train.micro_batch_size", "train.device",
    "train.compile", "eval", "checkpoint", "log", "launch",
}  # fmt: skip


COMPLETE = "This run is complete: raise train.epochs to go on, or start over with --fresh."


class Run:
    """One run directory, local or remote. Only rank 0 writes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.metrics = Journal(storage.join(url, "metrics.jsonl"))
        self._status: dict[str, Any] = {}

    def at(self, *names: str) -> str:
        """The URL of something in this run."""
        return storage.join(self.url, *names)

    def status(self) -> dict[str, Any] | None:
        """What status.json says, or None before the first start."""
        status: dict[str, Any] | None = _json(self.at("status.json"))
        return status

    def written_job(self) -> dict[str, Any] | None:
        """The job this directory was made for, as plain values, or None for a new directory."""
        job: dict[str, Any] | None = (_json(self.at("provenance.json")) or {}).get("job")
        return job

    def open(
        self, config_text: str, job: dict[str, Any], started_with: Sequence[str], machine: Mapping[str, Any]
    ) -> None:
        """Write the job and where it comes from, before step 1.

        Raises JobError if the directory belongs to another job.
        """
        provenance = _json(self.at("provenance.json")) or {"attempts": []}
        differences = changed(provenance["job"], job) if "job" in provenance else []
        if differences:
            raise JobError(
                f"{self.url} holds a run of another job:\n" + "\n".join(f"  {line}" for line in differences) +
                "\nput the old values back, or start a new run with --fresh or another run.dir"
            )  # fmt: skip
        attempt = {"started_at": _now(), "command": [_without_secrets(word) for word in started_with], **machine}
        provenance |= {
            "job": job,
            "attempts": [*provenance["attempts"], attempt | source_code() | {"packages": _packages()}],
        }
        try:
            storage.write(self.at("config.yaml"), config_text.encode())
            storage.write(self.at("provenance.json"), _text(provenance))
        except OSError as error:
            raise JobError(f"run.dir {self.url} cannot be written: {error}; choose another run.dir") from error
        self._status = {"attempt": len(provenance["attempts"]), "host": machine.get("host"), "pid": os.getpid()}

    def completed(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The status of a run that has already done all that `job`, as plain values, asks for; else None."""
        status, written = self.status(), self.written_job()
        if not status or not written or status["state"] != "completed":
            return None
        same_end = all(written["train"][key] == job["train"][key] for key in ("epochs", "max_steps"))
        return status if same_end and not changed(written, job) else None

    def set_status(self, state: str, durable: bool = True, **values: Any) -> None:
        """Replace status.json: what is not named stays. `heartbeat` is now."""
        self._status |= {"state": state, "heartbeat": _now(), **values}
        storage.write(self.at("status.json"), _text(self._status), durable)

    def failed(self, reason: str) -> None:
        """Mark a run as failed whose own rank 0 no longer can."""
        self._status = self.status() or {}
        self.set_status("failed", reason=reason, exit=1)


class Journal:
    """A file of JSON lines that grows.

    On an object store, which cannot append, it grows in a local spool and is uploaded whole.
    """

    UPLOAD_S = 30.0

    def __init__(self, url: str) -> None:
        self.url = url
        self._file: Any = None
        self._uploaded_s = 0.0

    def open(self, last_step: int) -> None:
        """Start appending after the lines of steps up to `last_step`; later ones, of a past that is no more, are cut
        off.
        """
        kept = [line for line in self.read() if line["step"] <= last_step]
        content = "".join(json.dumps(line) + "\n" for line in kept).encode()
        storage.write(self.url, content)
        path = storage.local_path(self.url)
        if path is None:
            self._file = tempfile.NamedTemporaryFile("a", prefix="toolkit-spool-", suffix=".jsonl")  # noqa: SIM115
            self._file.write(content.decode())
            self._file.flush()  # or an upload before the first line would empty the remote copy
        else:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for as long as the run is

    def append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if time.monotonic() - self._uploaded_s > self.UPLOAD_S:
            self.upload()

    def upload(self) -> None:
        """Bring a remote copy up to date; a local file is so already."""
        if self._file is not None and storage.local_path(self.url) is None:
            storage.write(self.url, Path(self._file.name).read_bytes())
            self._uploaded_s = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self.upload()
            self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """All lines, oldest first."""
        try:
            content = storage.read(self.url)
        except FileNotFoundError:
            return []
        whole, _, _ = content.decode().rpartition("\n")  # a line that a kill cut short has no end
        return [json.loads(line) for line in whole.splitlines() if line]


def fresh_url(url: str) -> str:
    """The first of url-2, url-3, … that does not exist; the URL itself if it doesn't."""
    number, free = 2, url.rstrip("/")
    while storage.exists(free):
        number, free = number + 1, f"{url.rstrip('/')}-{number}"
    return free


def changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two jobs of one run and may not, as `key: old -> new`."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        at, before, after = prefix + key, old.get(key), new.get(key)
        if at in MAY_CHANGE or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed(before, after, f"{at}.")
        else:
            lines.append(f"{at}: {before!r} -> {after!r}")
    return lines


def source_code() -> dict[str, Any]:
    """The git commit and uncommitted changes of the folder the command runs in; nothing outside a repository."""
    commit = _git("rev-parse", "HEAD")
    return {"git_commit": commit, "git_diff": _git("diff", "HEAD")[:100_000]} if commit else {}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _packages() -> dict[str, str]:
    return {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]} | {
        "python": sys.version.split()[0]
    }


def _without_secrets(word: str) -> str:
    """A word of a command line without passwords: those in URLs, and the values of keys that sound like one."""
    word = re.sub(r"(://)[^/\s]*@", r"\1…@", word)
    word = re.sub(r"(?i)([?&][^=&]*(secret|token|password|credential|key|sig)[^=&]*)=[^&\s]*", r"\1=…", word)
    return re.sub(r"(?i)^([^=]*(secret|token|password|credential|key)[^=]*)=.*", r"\1=…", word)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _json(url: str) -> Any:
    try:
        return json.loads(storage.read(url))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise JobError(f"{url} is damaged ({error}); remove it, or start a new run with --fresh") from error


def _text(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()
