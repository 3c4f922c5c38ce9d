"""A file from the network: fetched once a node, verified, kept."""

import fcntl
import hashlib
from pathlib import Path

from toolkit import storage
from toolkit.errors import JobError


def fetched(url: str, sha256: str, cache: str) -> Path:
    """The local copy of a URL.

    One process of the node downloads while the others wait; a wrong checksum leaves nothing behind.
    """
    path = Path(cache).expanduser() / sha256[:16] / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            storage.write(str(path), _verified(url, sha256))
    return path


def _verified(url: str, sha256: str) -> bytes:
    try:
        content = storage.read(url)
    except Exception as error:  # each file system raises its own kind: aiohttp's are no OSError
        raise JobError(
            f"{url} cannot be downloaded ({type(error).__name__}: {error}); check the network, or give the "
            "folder of the files as root"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise JobError(
            f"{url} is damaged: {len(content)} bytes with SHA-256 {found}, expected {sha256}; "
            "try again, or give the files' folder as root"
        )
    return content
