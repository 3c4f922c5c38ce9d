"""A file from the network: fetched once a node, verified, kept."""

import fcntl
import hashlib
from pathlib import Path
from typing import NamedTuple

from toolkit import storage
from toolkit.errors import RunError

CACHE = "~/.cache/toolkit"
PIECE_BYTES = 16 << 20


class Download(NamedTuple):
    """A file that a dataset takes from the network, as `fetched` is called.

    A dataset's class lists its files in `downloads(**args)`, a class method with the arguments of its constructor, for
    `toolkit fetch`. `size_bytes` is given for a file that is too large for one request of 30 s.
    """

    url: str
    sha256: str
    cache: str = CACHE
    size_bytes: int | None = None

    @property
    def path(self) -> Path:
        """Where the local copy lies, if there is one."""
        return Path(self.cache).expanduser() / self.sha256[:16] / self.url.rsplit("/", 1)[-1]

    def ensure(self) -> str:
        """Have a local copy that is what it should be. Returns what that took, in words."""
        if self.path.exists() and _sha256(storage.read(str(self.path))) == self.sha256:
            return "there already, verified"
        damaged = self.path.exists()
        storage.remove(str(self.path))
        fetched(*self)
        return "was damaged, fetched again" if damaged else "fetched, verified"


def fetched(url: str, sha256: str, cache: str = CACHE, size_bytes: int | None = None) -> Path:
    """The local copy of a URL.

    One process of the node downloads while the others wait; a wrong checksum leaves nothing behind. Raises RunError if
    the file does not come, or comes damaged: that is the network's fault, or its server's, and not the job's.
    """
    path = Download(url, sha256, cache).path
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            storage.write(str(path), _verified(url, sha256, size_bytes))
    return path


def _verified(url: str, sha256: str, size_bytes: int | None) -> bytes:
    try:
        content = storage.read(url) if size_bytes is None else _in_pieces(url, size_bytes)
    except OSError as error:
        raise RunError(
            f"{storage.shown(url)} cannot be downloaded ({type(error).__name__}: {error}); check the network, or give "
            "the folder of the files as root"
        ) from error
    found = _sha256(content)
    if found != sha256:
        raise RunError(
            f"{storage.shown(url)} is damaged: {len(content)} bytes with SHA-256 {found}, expected {sha256}; "
            "try again, or give the files' folder as root"
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _in_pieces(url: str, size_bytes: int) -> bytes:
    """Each piece is a request of its own, tried again by itself."""
    starts = range(0, size_bytes, PIECE_BYTES)
    return b"".join(storage.read(url, start, min(start + PIECE_BYTES, size_bytes)) for start in starts)
