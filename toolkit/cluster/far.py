"""What a supervisor knows of one node of a step, by what its agent says."""

import queue
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from toolkit.attempt import Look
from toolkit.cluster.link import Link


class Far:
    """A node, as seen from here."""

    def __init__(self, link: Link, hello: Mapping[str, Any]) -> None:
        self.link = link
        self.host, self.step = str(hello["host"]), str(hello["step"])
        self.address, self.port = str(hello["address"]), int(hello["port"])
        self.heard_s = time.monotonic()
        self.started = False  # only then it has anything to say
        self.look = Look(torchruns=[None])
        self.undead: list[str] | None = None  # what it could not end, once it has ended
        self.missing: list[str] = []  # what it should see and does not
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @property
    def over(self) -> bool:
        return self.undead is not None

    def ask(self, timeout_s: float, **question: Any) -> Any:
        """Its answer; None if there is none within that time."""
        with suppress(OSError, queue.Empty):
            self.link.send(**question)
            return self.answers.get(timeout=timeout_s)
        return None
