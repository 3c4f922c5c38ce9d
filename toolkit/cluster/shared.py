"""Whether the nodes of a cluster can see a folder of this machine, as far as that can be known from here."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import JobError

# File systems that live in one machine's memory, or are made for one container.
OF_ONE_MACHINE = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "overlay", "aufs"}


MOVE = "give one that all nodes see, in your home or on the cluster's scratch space"


def refuse_unseen(
    path: str | None, what: str, shared: Sequence[str], mounts: Sequence[tuple[str, str]] = (), remedy: str = MOVE
) -> None:
    """Raises JobError if `path` lies on a file system of this machine alone, or in none of the cluster's `shared`
    folders. None, which stands for a remote URL, is seen from everywhere. `mounts` are (folder, type).
    """
    if path is None:
        return
    path = os.path.realpath(path)
    if shared and not any(_is_in(path, os.path.realpath(folder)) for folder in shared):
        raise JobError(
            f"{what} {path} is in none of the folders that the cluster profile calls shared ({', '.join(shared)}); "
            f"{remedy}"
        )
    folder, kind = max(
        (mount for mount in mounts or _mounts() if _is_in(path, mount[0])), key=lambda mount: len(mount[0]),
        default=("/", ""),
    )  # fmt: skip
    if kind in OF_ONE_MACHINE and folder != "/":
        raise JobError(f"{what} {path} is on {folder}, a {kind} of this machine, which no node can see; {remedy}")


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts() -> list[tuple[str, str]]:
    """The mounts of this machine, later ones over earlier; see proc_pid_mountinfo(5)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in reversed(lines):
        about, _, source = line.partition(" - ")
        folder = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), about.split()[4])
        found.append((folder, source.split()[0]))
    return found
