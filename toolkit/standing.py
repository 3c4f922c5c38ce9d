"""Where a run stands, as its supervisor is told by what lies in its directory, which may be away."""

from collections.abc import Iterator
from contextlib import contextmanager

from toolkit import storage
from toolkit.config import Job
from toolkit.console import say
from toolkit.errors import JobError
from toolkit.run import CANCEL, COMPLETE, STOP, Run

ENDS = ("completed", "preempted", "cancelled")  # what rank 0 says of a start in which nothing has failed


def says_complete(job: Job) -> bool:
    """Whether the job's run has already done all that the job asks for; then says so."""
    done = Run(job.run.dir).completed(job.as_written())
    if done:
        say(f"{done['summary']}\n{COMPLETE}")
    return done is not None


def asked_to_end(run: Run) -> bool:
    """Whether somebody wants an end of the run, or got one from its last start, which takes the request away."""
    with complained():
        if any(storage.exists(run.at("requests", wish)) for wish in (STOP, CANCEL)):
            return True
        status = run.status() or {}
        return status.get("state") in ENDS and bool(status.get("asked"))
    return False


@contextmanager
def complained() -> Iterator[None]:
    """A store that is away keeps no failure from being told on the console, nor the run from being started again."""
    try:
        yield
    except (OSError, JobError) as error:
        say(f"WARNING: {error}", error=True)
