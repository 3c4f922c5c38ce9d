"""How long an operation may take."""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

PATIENCE_S = 45.0
TRY_S = 30.0
SLOW_TRIES = 3


_local = threading.local()


class Budget:
    """The time one operation has for all its tries. Bytes that move give it more: a slow line is not a dead one."""

    def __init__(self) -> None:
        self.until_s: float = getattr(_local, "until_s", float("inf"))
        self.token = uuid.uuid4().hex  # names what the tries have in common
        self.tries = 0
        self.began_s = time.monotonic()
        self.deadline_s = min(self.began_s + PATIENCE_S, self.until_s)

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def moved(self) -> None:
        if self.tries <= SLOW_TRIES:  # or a line that breaks each time would be tried for ever
            self.deadline_s = min(time.monotonic() + PATIENCE_S, self.until_s)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """All operations of this thread inside, together, may take that long; patience inside patience only shortens."""
    before = getattr(_local, "until_s", float("inf"))
    _local.until_s = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _local.until_s = before
