"""A request to stop, from a signal.

The handler sets a flag and nothing else: saving inside a handler hangs or never finishes.
"""

import signal
from types import FrameType

# USR1 and USR2 are what schedulers send before a time limit or a preemption.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def hold_back() -> None:
    """Let stopping signals wait until `listen`: one that comes while torch is imported is a stop, too, and no crash."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


class StopSignals:
    """From `listen` on, a stopping signal sets `received`. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> "StopSignals":
        for number in STOPPING:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def wanted(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
