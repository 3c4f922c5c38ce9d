"""A request to stop, from a signal.

The handler sets a flag and nothing else: saving inside a handler hangs or never finishes.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from toolkit.errors import JobError

# USR1 and USR2 are what schedulers send before a time limit or a preemption.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def hold_back() -> None:
    """Let stopping signals wait until `listen`: one that comes while torch is imported is a stop, too, and no crash.

    Once `listening` is over they do nothing: the mask is this thread's, and another may be handed one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    for number in STOPPING:
        signal.signal(number, _nothing)  # SIG_IGN would drop those that wait


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def leave_at_once() -> None:
    """End this process in the middle of whatever it does. A save in flight is not waited for: it never existed."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar may have hidden the cursor
    os.write(2, b"left at once; what came after the newest checkpoint is lost; the same command goes on from there\n")
    os._exit(1)


class StopSignals:
    """From `listen` on, or while `listening`, a stopping signal sets `received`. A second Ctrl-C leaves at once."""

    def __init__(self, at_second_interrupt: Callable[[], None] = leave_at_once) -> None:
        self.received: signal.Signals | None = None
        self.at_second_interrupt = at_second_interrupt

    def listen(self) -> "StopSignals":
        """Hear signals to the end of this process."""
        for number in STOPPING:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    @contextmanager
    def listening(self) -> Iterator["StopSignals"]:
        """Hear signals in here. Afterwards handlers and mask are those from before, such as a notebook's.

        Raises JobError outside the main thread, which alone can hear them in Python.
        """
        if (thread := threading.current_thread()) is not threading.main_thread():
            raise JobError(
                f"signals that stop a run are heard by the main thread only, and this is thread {thread.name!r}; "
                "use toolkit.launch, or train in the main thread"
            )
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        try:
            yield self.listen()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: one in C, which Python cannot put back

    def wanted(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            self.at_second_interrupt()
        self.received = signal.Signals(number)
