"""Stores that fsspec reaches. Every call has a time limit, and a try that hangs is cancelled."""

import asyncio
import concurrent.futures
import contextlib
import glob
import os
import posixpath
import threading
import time
import weakref
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

import fsspec.asyn

from toolkit.storage.budget import TRY_S, Budget

LATE_S = 2.0  # for a coroutine to end when it is cancelled
EXCLUSIVE = {"abfs", "abfss", "az", "gcs", "gs", "memory"}

_one_by_one = threading.Lock()  # the file system in memory looks before it makes
_using = threading.Lock()
_used = weakref.WeakSet[Any]()
_of_parent = list[Any]()


class Store:
    """What every file system of fsspec can do: gs, az, memory, http, and those that nobody here has met."""

    def __init__(self, filesystem: Any, protocol: str, budget: Budget) -> None:
        self.filesystem, self.protocol, self.budget = filesystem, protocol, budget
        self._timer: asyncio.Timeout | None = None
        with _using:
            _used.add(filesystem)

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a file system is made with, beside what the user has set for it."""
        del given
        return {"use_listings_cache": False}

    @classmethod
    def split(cls, url: str) -> tuple[str, str | None]:
        """A URL that fsspec is to understand, and the path in it if fsspec is not."""
        return url, None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the file system."""
        if self.filesystem.async_impl:
            return self.wait(getattr(self.filesystem, "_" + method)(*args, **kwargs))
        with _one_by_one:
            return getattr(self.filesystem, method)(*args, **kwargs)

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine, which runs in fsspec's thread and is cancelled there when time is over."""

        async def bounded() -> Any:
            async with asyncio.timeout(self._try_s()) as self._timer:
                return await coroutine

        future = asyncio.run_coroutine_threadsafe(bounded(), self.filesystem.loop)
        self._late_s = time.monotonic() + self._try_s() + LATE_S
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=1.0)
                if time.monotonic() > self._late_s and not future.done():
                    raise TimeoutError
            return future.result()
        finally:
            future.cancel()  # does nothing to one that has ended

    def moved(self) -> None:
        """Called in the coroutine when bytes have moved: a slow line is given time, a dead one is not."""
        if self._timer:
            with contextlib.suppress(RuntimeError):  # its time is over already
                self.budget.moved()
                self._timer.reschedule(asyncio.get_running_loop().time() + self._try_s())
                self._late_s = time.monotonic() + self._try_s() + LATE_S

    def _try_s(self) -> float:
        return min(TRY_S, self.budget.left_s)

    def renew(self) -> None:
        """Do what it takes before another try."""

    def exists(self, path: str) -> bool:
        try:
            self.call("info", path)
        except FileNotFoundError:
            return False
        return True

    def names(self, path: str) -> list[str]:
        return [posixpath.basename(entry["name"].rstrip("/")) for entry in self.entries(path)]

    def size(self, path: str) -> int:
        info = self.call("info", path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        return int(info["size"])

    def sizes(self, path: str) -> dict[str, int]:
        files = [entry for entry in self.entries(path) if entry["type"] == "file"]
        return {posixpath.basename(entry["name"]): int(entry["size"]) for entry in files}

    def entries(self, path: str) -> list[dict[str, Any]]:
        """What is directly under a path; fsspec also lists a file as its own content."""
        try:
            found = self.call("ls", path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for entry in found if entry["name"].strip("/") != path.strip("/")]

    def read(self, path: str, start: int, end: int | None) -> bytes:
        if start == 0 and end is None:
            content: bytes = self.call("cat_file", path)
            return content
        size = self.size(path)  # not every store takes an end that lies beyond the file's
        end = size if end is None else min(end, size)
        return bytes(self.call("cat_file", path, start=start, end=end)) if start < end else b""

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        content = self.read(path, start, start + len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def write(self, path: str, content: memoryview, durable: bool) -> None:
        del durable  # a store answers when it has what it was given
        self.call("pipe_file", path, bytes(content))

    def sync(self, folder: str, names: Iterable[str]) -> None:
        del folder, names

    def create(self, path: str, content: memoryview) -> bool:
        if self.protocol not in EXCLUSIVE:
            self.write(path, content, durable=True)
            return True
        try:
            self.call("pipe_file", path, bytes(content), mode="create")
        except FileExistsError:
            return False
        return True

    def exclusive_note(self, path: str) -> str:
        del path
        return "" if self.protocol in EXCLUSIVE else advisory(f"{self.protocol}://")

    def move(self, path: str, new_path: str) -> None:
        files = [file for file in self.call("find", path) if not file.endswith("/")]
        if not files:
            raise FileNotFoundError(path)
        for file in files:
            self.call("cp_file", file, new_path + file.strip("/").removeprefix(path.strip("/")))
        self.remove(path)

    def remove(self, path: str) -> None:
        try:
            if glob.escape(path) == path:
                self.call("rm", path, recursive=True)
            else:  # fsspec would take the name for a pattern, and remove all that matches it
                for file in self.call("find", path):
                    self.call("rm_file", file)
        except FileNotFoundError:
            return

    def free_bytes(self, path: str) -> int | None:
        del path
        return None

    def abort_uploads(self, path: str) -> int:
        del path
        return 0


def advisory(store: str) -> str:
    return f"{store} has no exclusive create, so a lock there is advisory: never start two writers in the same moment"


def _before_fork() -> None:
    _using.acquire()
    _of_parent.extend(_used)


def _after_fork_in_parent() -> None:
    _of_parent.clear()
    _using.release()


def _after_fork_in_child() -> None:
    """A child makes connections of its own. It keeps its parent's for ever, for to close them would disturb them."""
    global _one_by_one  # noqa: PLW0603 - another thread of the parent may have held it
    _one_by_one = threading.Lock()
    _using.release()
    fsspec.asyn.reset_lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
