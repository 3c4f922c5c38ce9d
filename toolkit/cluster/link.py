"""Messages between a supervisor and its agents: one JSON object a line, over one TCP connection a node."""

import io
import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST = 1 << 26  # bytes of a line; logs travel in pieces far smaller
WAIT_S = 1.0  # that silences are counted in: one in which this process was suspended says nothing of the other end


class Link:
    """One end of a connection. Any thread may send, one may listen. `patience_s` is how long the other end may be
    silent, or take nothing of what is sent; None is for ever.
    """

    def __init__(self, connection: socket.socket, patience_s: float | None) -> None:
        self.connection, self._incoming = connection, _Incoming(connection)
        self.be_patient(patience_s)
        self._lines = io.BufferedReader(self._incoming)
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def be_patient(self, patience_s: float | None) -> None:
        """For so long, from now on."""
        self._incoming.patience_s = float("inf") if patience_s is None else patience_s
        self.connection.settimeout(patience_s)

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
            self._lines.close()

    def _next(self) -> bytes:
        try:
            line = self._lines.readline(LONGEST)
        except (OSError, ValueError):  # silent, reset, or closed by this end
            return b""
        return line if line.endswith(b"\n") else b""


class _Incoming(io.RawIOBase):
    """What comes over a connection, to its end: when nothing has come for `patience_s` in which this process ran."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.patience_s = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        waiting, silent_s = select.poll(), 0.0
        waiting.register(self.connection, select.POLLIN)
        while silent_s < self.patience_s:
            if waiting.poll(WAIT_S * 1000):
                return self.connection.recv_into(buffer)
            silent_s += WAIT_S
        return 0
