"""Bytes by URL. The only door to fsspec.

A path without a scheme is a local file. A reader sees the old bytes or the new, whatever is killed: a local file gets
its name when it is whole and on disk, an object is put at once. Nothing goes through `with open(url, "wb")`, which
publishes a truncated object when an exception passes through it. Names that begin with `.tmp-` are of files that are
being written.

A remote operation is tried again while its error is one that passes, for PATIENCE_S in all; a try that hangs is
cancelled after 30 s without a byte. What `create` relies on, so that of many creators one wins:

    local           a hard link to a whole file; where there are no links, open(O_EXCL)
    s3              PUT with If-None-Match: AWS, and most others; `exclusive_note` tries out those that are not AWS
    gs              ifGenerationMatch=0
    az, abfs        overwrite=False, which is If-None-Match
    sftp, ssh       a hard link to a whole file; where there are no links, open(SSH_FXF_EXCL)
    memory          a lock of this process
    all others      nothing: look, then write
"""

import posixpath
from collections.abc import Iterable

from toolkit.secret import Secret
from toolkit.storage import failures, local
from toolkit.storage.budget import PATIENCE_S, patience
from toolkit.storage.connection import AnyStore, connected, persistently
from toolkit.storage.failures import shown
from toolkit.storage.local import sync_folder

__all__ = [
    "PATIENCE_S", "abort_uploads", "create", "exclusive_note", "exists", "free_bytes", "join", "local_path", "move",
    "names", "patience", "read", "read_into", "remove", "shown", "size", "sizes", "sync", "sync_folder", "write",
]  # fmt: skip


def join(url: str, *names: str) -> str:
    """The URL of a name under a URL."""
    joined = posixpath.join(url, *names)
    return Secret(joined, posixpath.join(url.written, *names)) if isinstance(url, Secret) else joined


def local_path(url: str) -> str | None:
    """The path of a URL on this machine's own file system, or None if it is elsewhere."""
    store, path = connected(url)
    return path if isinstance(store, local.Local) else None


def exists(url: str) -> bool:
    return persistently("look for", url, lambda store, path: store.exists(path))


def names(url: str) -> list[str]:
    """The names directly under a URL, sorted; none if it does not exist."""
    return persistently("list", url, lambda store, path: sorted(store.names(path)))


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return persistently("look for", url, lambda store, path: store.size(path))


def sizes(url: str) -> dict[str, int]:
    """Bytes of every file directly under a URL by name, asked for anew each time; none if it does not exist."""
    return persistently("list", url, lambda store, path: store.sizes(path))


def read(url: str, start: int = 0, end: int | None = None) -> bytes:
    """The bytes of a file from `start` to before `end`, or to where it ends. Raises OSError, or FileNotFoundError."""
    return persistently("read", url, lambda store, path: store.read(path, start, end))


def read_into(url: str, start: int, buffer: memoryview) -> int:
    """Fill the buffer with the bytes of a file from `start`. Returns how many came: less where the file ends."""
    return persistently("read", url, lambda store, path: store.read_into(path, start, buffer.cast("B")))


def write(url: str, content: bytes | memoryview, durable: bool = True) -> None:
    """Put whole content at a URL, making folders on the way.

    `durable=False` leaves out fsync: atomic, but not over a power cut.
    """
    view = memoryview(content).cast("B")
    persistently("write", url, lambda store, path: store.write(path, view, durable))


def sync(url: str, names: Iterable[str]) -> None:
    """Make files directly under a URL durable that were written with `durable=False`, and their names.

    Many files are on disk sooner so than each by itself. After an OSError they must be written again.
    """
    store, path = connected(url)
    if not isinstance(store, local.Local):
        persistently("write", url, lambda store, path: store.sync(path, names))
        return
    try:
        store.sync(path, names)  # once: a second fsync says nothing of what the first has lost
    except OSError as error:
        failures.tell(error, "write", url, local=True)


def create(url: str, content: bytes) -> bool:
    """Put whole content where nothing is. False, and nothing is done, where something is; see the table above."""

    def attempt(store: AnyStore, path: str) -> bool:
        if not store.exists(path) and store.create(path, memoryview(content)):
            return True
        return store.budget.tries > 1 and store.read(path, 0, None) == content  # the answer to the first try was lost

    return persistently("write", url, attempt)


def exclusive_note(url: str) -> str:
    """Nothing where `create` lets one win; else a sentence that says what to know."""
    return persistently("write", url, lambda store, path: store.exclusive_note(path))


def move(url: str, new_url: str) -> None:
    """Give a file or a folder another name, in the same store. On object stores that is a copy, then a removal."""
    new_path = connected(new_url)[1]

    def attempt(store: AnyStore, path: str) -> None:
        try:
            store.move(path, new_path)
        except FileNotFoundError:
            if store.budget.tries == 1 or not store.exists(new_path):  # else the answer to the first try was lost
                raise

    persistently("move", url, attempt)


def remove(url: str) -> None:
    """Remove a file, or a folder and all under it; nothing happens where there is none."""
    persistently("remove", url, lambda store, path: store.remove(path))


def free_bytes(url: str) -> int | None:
    """Free space for this user where a URL lies or will lie; None for a store that does not say."""
    return persistently("look for", url, lambda store, path: store.free_bytes(path))


def abort_uploads(url: str) -> int:
    """Abort uploads under a URL that a kill has left unfinished; returns how many. They are unseen, but cost money."""
    return persistently("clean up", url, lambda store, path: store.abort_uploads(path))
