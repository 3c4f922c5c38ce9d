"""A file of JSON lines that grows, also where nothing can be appended."""

import json
import tempfile
import threading
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from toolkit import storage

Line = Mapping[str, Any]
_NOTHING: Line = {}


class Journal:
    """A file of JSON lines that grows.

    On an object store, which cannot append, it grows in a local spool, and `upload` brings it there whole. A line that
    cannot be written, because the disk is full, is kept and tried again with the next one: `problem` says why.
    """

    UPLOAD_S = 30.0

    def __init__(self, url: str) -> None:
        self.url = url
        self.problem: str | None = None
        self._file: Any = None
        self._pending = b""
        self._uploaded_s = 0.0
        self._uploading = threading.Lock()

    def open(self, last_step: int, amendment: Line = _NOTHING) -> None:
        """Start appending after the lines of steps up to `last_step`, the last of which gets an amendment; later ones,
        of a past that is no more, are cut off.
        """
        kept = [line for line in self.read() if line["step"] <= last_step]
        if kept and kept[-1]["step"] == last_step:
            kept[-1] |= _plain(amendment)
        self.close(upload=False)
        content = b"".join(map(_encoded, kept))
        storage.write(self.url, content)
        path = storage.local_path(self.url)
        if path is None:
            self._file = tempfile.NamedTemporaryFile("ab", prefix="toolkit-spool-", suffix=".jsonl", buffering=0)  # noqa: SIM115
            self._file.write(content)  # or an upload before the first line would empty the remote copy
        else:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for as long as the run is

    def append(self, line: Line) -> None:
        """Add a line. What is no finite number becomes null, for JSON knows no other."""
        self._pending += _encoded(_plain(line))
        self._flush()

    @property
    def overdue(self) -> bool:
        """Whether the remote copy is older than UPLOAD_S; a local file never is."""
        remote = self._file is not None and storage.local_path(self.url) is None
        return remote and time.monotonic() - self._uploaded_s > self.UPLOAD_S

    def upload(self) -> None:
        """Bring a remote copy up to date; a local file is so already. May be called from any thread."""
        with self._uploading:
            if self._file is None or storage.local_path(self.url) is not None:
                return
            self._uploaded_s = time.monotonic()
            storage.write(self.url, Path(self._file.name).read_bytes())

    def close(self, upload: bool = True) -> None:
        """Write what is left, and bring a remote copy up to date. Raises OSError if that cannot be done."""
        if self._file is None:
            return
        try:
            self._flush()
            if self.problem:
                raise OSError(self.problem)
            if upload:
                self.upload()
        finally:
            with self._uploading:
                self._file.close()
                self._file = None

    def read(self) -> list[dict[str, Any]]:
        """All lines, oldest first."""
        try:
            content = storage.read(self._file.name if self._file else self.url)
        except FileNotFoundError:
            return []
        whole, _, _ = content.rpartition(b"\n")  # a line that a kill cut short has no end
        return [json.loads(line) for line in whole.decode().split("\n") if line]

    def names_at(self, step: int) -> list[str]:
        """What the line of a step tells of; nothing if there is none."""
        return [name for line in self.read() if line["step"] == step for name in line]

    def _flush(self) -> None:
        """Append what is pending, whole or not at all."""
        try:
            while self._pending:
                count = self._file.write(self._pending)
                self._pending = self._pending[count:]
        except OSError as error:
            self.problem = f"{storage.shown(self.url)} cannot be written: {error}"
        else:
            self.problem = None


def _plain(line: Line) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in line.items()}


def _encoded(line: Line) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"
