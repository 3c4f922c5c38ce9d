"""Messages between a supervisor and its agents: one JSON object a line, over one TCP connection a node."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

LONGEST = 1 << 26  # bytes of a line; logs travel in pieces far smaller


class Link:
    """One end of a connection. Any thread may send, one may listen. `patience_s` is how long the other end may be
    silent, or take nothing of what is sent.
    """

    def __init__(self, connection: socket.socket, patience_s: float) -> None:
        self.connection = connection
        connection.settimeout(patience_s)
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Raises OSError where the other end is gone."""
        content = json.dumps(message).encode() + b"\n"
        with self._sending:
            self.connection.sendall(content)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the other end says from now on, until it is gone, silent for too long, or talks nonsense."""
        while line := self._next():
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(message, dict):
                return
            yield message

    def close(self) -> None:
        """Both ends learn of it, also a thread that waits in `messages`."""
        with suppress(OSError):  # the other end was first
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        with suppress(OSError):
            self._lines.close()  # the descriptor is let go only with its last user; who reads has been woken

    def _next(self) -> bytes:
        try:
            line = self._lines.readline(LONGEST)
        except (OSError, ValueError):  # silent, reset, or closed by this end
            return b""
        return line if line.endswith(b"\n") else b""
