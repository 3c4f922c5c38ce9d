"""Training from a notebook, or from any program of one's own: `toolkit.launch`.

Several ranks must not live in a notebook's own process, so it starts the very command that a shell would, supervisor
and all, and shows what that says.
"""

import codecs
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from toolkit.config import Job, job_file, load_job
from toolkit.errors import JobError, RunError
from toolkit.results import Run

# If the notebook goes, its training is stopped as by SIGTERM: with everything saved.
_COMMAND = """
import signal, sys
from toolkit import cli, process
process.die_with_parent({parent}, signal.SIGTERM)
sys.argv[0] = "toolkit"
cli.main()
"""
_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_POLL_S = 0.1


def launch(job: str | os.PathLike[str] | Job, *overrides: str, processes: int | None = None) -> Run:
    """Start or resume the run of a job on that many ranks of this machine, and return it when it has ended.

    `job` is a job file, changed by `overrides` such as "train.epochs=3", or a Job. Meanwhile what rank 0 says is
    printed. An interrupt stops the run with everything saved, a second one leaves at once. The run's `status()` tells
    `completed` from `preempted`. Raises JobError if the job is wrong, with nothing written, RunError if the run fails.
    """
    with job_file(job) as path:
        run = Run(load_job(path, overrides, os.environ).run.dir)
        count = [] if processes is None else ["--processes", str(processes)]
        environment = {name: value for name, value in os.environ.items() if name not in _RANK}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _COMMAND.format(parent=os.getpid()), "train", path, *overrides, *count]
            status, message = _shown(command, environment, Path(folder))
    if status == 2:
        raise JobError(message)
    if status not in (0, 75):
        raise RunError(message or f"the command ended with status {status}")
    if message:
        print(message, file=sys.stderr)
    return run


def _shown(command: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """(exit status, stderr) of a command whose stdout is shown as it comes.

    It comes through a file: a pipe would break with this process, and the command in the middle of its last save.
    """
    decoded = codecs.getincrementaldecoder("utf-8")("replace")
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err, open(folder / "out", "rb") as said:
        # In a session of its own: a notebook interrupts its whole process group, and then we pass it on again.
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            ended = False
            while not ended:
                try:
                    ended = _ends_within(process, _POLL_S)
                    print(decoded.decode(said.read()), end="", flush=True)
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGINT)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode, (folder / "err").read_text(errors="replace").strip()


def _ends_within(process: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
        return True
    return False
