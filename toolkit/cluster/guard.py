"""What a job's script runs: a command, watched. Killed, it is started again: nobody else would do so.

python -m toolkit.cluster.guard COMMAND…
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from toolkit.cluster import slurm
from toolkit.console import say
from toolkit.errors import RunError
from toolkit.process import die_with_parent
from toolkit.signals import STOPPING, hold_back

_POLL_S = 0.2
KILLS = 5  # in a row, each within a minute; then it is not by chance


def keep(command: Sequence[str]) -> None:
    """Run a command to its end, passing on the signals that this process gets.

    Returns if it ends with 0. Ends this process if it ends with 75: stopped early, and no result yet. Raises RunError.
    """
    with suppress(PermissionError):  # a batch step leads a session already
        os.setsid()  # on a user's machine: Ctrl-C is not meant for what was sent to the background
    guard = Guard(command)
    status = guard.run()
    guard.bury()
    if status == 75:
        sys.stdout.flush()
        os._exit(75)  # a SystemExit would be noted as a result
    if status:
        raise RunError(f"{command[0]} … ended with status {status}; what it said is above")


class Guard:
    """One command, and the process that runs it now."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command, self.parent = list(command), os.getppid()
        self.child: subprocess.Popen[bytes] | None = None
        self.received: set[int] = set()
        for number in STOPPING:
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def run(self) -> int:
        """Its exit status; that of a shell if a signal ends it again and again."""
        kills = 0
        while True:
            started_s = time.monotonic()
            self.child = subprocess.Popen(self.command, preexec_fn=partial(_as_child, os.getpid()))  # noqa: PLW1509
            for number in sorted(self.received):  # while there was no command, or by the one that was killed
                self.child.send_signal(number)
            while (status := self.child.poll()) is None:
                time.sleep(_POLL_S)  # no wait for ever: a signal that came just before it would wait as long
            if status >= 0:
                return status
            kills = kills + 1 if time.monotonic() - started_s < 60 else 1
            name = signal.Signals(-status).name
            if kills > KILLS:
                say(f"the supervisor was killed by {name}, the {kills}th time in a row", error=True)
                return 128 - status
            say(f"the supervisor was killed by {name}; it is started again")

    def bury(self) -> None:
        """End a job whose slurmstepd was killed: Slurm would never learn that this process has ended. One that is to be
        started again, or has been, is no longer ours to end.
        """
        job_id = slurm.own_job(os.environ)
        if os.getppid() == self.parent or not job_id:
            return
        with suppress(slurm.SlurmError):
            facts = slurm.job_facts(job_id, slurm.PATIENCE_S)
            started = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            if facts and (facts.state, facts.restarts) == ("RUNNING", started):
                slurm.cancel(job_id)

    def _pass_on(self, number: int, frame: object) -> None:
        self.received.add(number)
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)


def _as_child(parent: int) -> None:
    hold_back()  # signals wait until it listens
    die_with_parent(parent)


def main() -> int:
    """The command line."""
    guard = Guard(sys.argv[1:])
    status = guard.run()
    guard.bury()
    return status


if __name__ == "__main__":
    sys.exit(main())
