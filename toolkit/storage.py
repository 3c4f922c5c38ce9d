"""Bytes by URL. The only door to fsspec.

A path without a scheme is a local file. Local writes are atomic and durable: a reader sees the old bytes or the new,
whatever is killed. On an object store a whole object is put at once, which is atomic by itself. Nothing goes through
`with open(url, "wb")`, which publishes a truncated object when an exception passes through it.
"""

import contextlib
import glob
import os
import posixpath
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from toolkit.errors import JobError


def join(url: str, *names: str) -> str:
    """The URL of a name under a URL."""
    return posixpath.join(url, *names)


def local_path(url: str) -> str | None:
    """The path of a URL on this machine's own file system, or None if it is elsewhere."""
    filesystem, path = _open(url)
    return path if isinstance(filesystem, LocalFileSystem) else None


def exists(url: str) -> bool:
    filesystem, path = _open(url)
    return bool(filesystem.exists(path))


def names(url: str) -> list[str]:
    """The names directly under a URL, sorted; none if it does not exist."""
    filesystem, path = _open(url)
    try:
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    filesystem, path = _open(url)
    return int(filesystem.size(path))


def read(url: str) -> bytes:
    """All bytes of a file. Raises OSError where there is none or it cannot be read."""
    filesystem, path = _open(url)
    content: bytes = filesystem.cat_file(path)
    return content


def write(url: str, content: bytes, durable: bool = True) -> None:
    """Put whole content at a URL, making folders on the way.

    `durable=False` leaves out fsync: atomic, but not over a power cut.
    """
    filesystem, path = _open(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with _temporary(folder) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    if durable:
        sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Make the names in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(url: str) -> None:
    """Remove a file, or a folder and all under it; nothing happens where there is none."""
    filesystem, path = _open(url)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(filesystem, LocalFileSystem) or glob.escape(path) == path:
            filesystem.rm(path, recursive=True)
        else:  # fsspec would take the name for a pattern, and remove all that matches it
            for file in filesystem.find(path):
                filesystem.rm_file(file)


def _open(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise JobError(f"{url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise JobError(f"{url} is not a URL that can be used: {error}") from error
    return filesystem, path


@contextlib.contextmanager
def _temporary(folder: str) -> Iterator[str]:
    """A new name in the folder, removed if it is still there at the end."""
    path = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
