"""The console of a supervisor, which may be gone, or on a disk that is full: no run ends for that."""

import os
from contextlib import suppress


def say(words: str, *, error: bool = False) -> None:
    """A line on stdout, or on stderr. One that cannot be written is lost.

    Past Python's buffers: they would keep it, and fail on it once more when the interpreter ends.
    """
    with suppress(OSError):
        write_all(2 if error else 1, f"{words}\n".encode(errors="replace"))


def write_all(descriptor: int, content: bytes) -> None:
    """Write to a descriptor, whole."""
    while content:
        content = content[os.write(descriptor, content) :]
