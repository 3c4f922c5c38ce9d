"""`toolkit cancel`: end a run, so that no scheduler starts it again."""

import contextlib
import time
from collections.abc import Callable

import psutil

from toolkit import storage
from toolkit.cluster import slurm
from toolkit.cluster.monitor import View, local_process, view
from toolkit.errors import RunError
from toolkit.process import is_gone
from toolkit.run import CANCEL, Run

Say = Callable[[str], None]
_POLL_S = 0.5
_IN_QUEUE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


def cancel(url: str, timeout_s: float, now: bool, say: Say) -> None:
    """Take a waiting run from the queue; have one that runs save everything and end, for which `timeout_s` is waited;
    or end it `now`, which loses what came after its newest checkpoint. One that has ended is no error.

    Raises RunError if it has not ended in time.
    """
    seen, run = view(url), Run(url)
    waits = _waits(seen, must_know=now or not seen.goes_on)  # else a request will do, which needs no Slurm
    if not seen.goes_on and not waits:
        say(f"{storage.shown(url)} has ended already: it is {seen.state}{': ' + seen.why if seen.why else ''}")
    elif now or waits:
        _end_now(seen, run, waits, timeout_s, say)
    else:
        _ask(run, timeout_s, say)


def _waits(seen: View, must_know: bool = False) -> bool:
    """Whether its job waits in the queue, as of now: what `view` knows may be 10 s old.

    Where Slurm does not say: False, unless one `must_know`; then raises SlurmError.
    """
    if not seen.known.submitted or not seen.known.job_id or seen.known.is_over:
        return False
    try:
        facts = slurm.job_facts(seen.known.job_id, patience_s=slurm.PATIENCE_S if must_know else 0.0)
    except slurm.SlurmError:
        if must_know:
            raise
        return False
    return facts is not None and facts.state == "PENDING"


def _end_now(seen: View, run: Run, waits: bool, timeout_s: float, say: Say) -> None:
    _end(seen, timeout_s)
    lost = "cancelled while it waited" if waits else "cancelled at once: what came after the newest checkpoint is lost"
    run.mark("cancelled", reason=lost, exit=75, heartbeat=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    say(f"{storage.shown(run.url)} is cancelled")


def _end(seen: View, timeout_s: float) -> None:
    """End a run's job, or its processes on this machine, and wait until nothing of it writes any more."""
    deadline_s = time.monotonic() + timeout_s
    if job := seen.known.job_id:
        slurm.cancel(job)  # with --state=PENDING, Slurm 22.05 would cancel all tasks of an array for one of them
        while (facts := slurm.job_facts(job)) and facts.state in _IN_QUEUE:
            if time.monotonic() > deadline_s:
                raise RunError(f"job {job} is still {facts.state}, {timeout_s:.0f} s after it was cancelled")
            time.sleep(_POLL_S)
    elif process := seen.known.submitted and local_process(seen.known.submitted):
        everyone = [process, *process.children(recursive=True)]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()  # so that nobody starts another meanwhile
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        while left := [one.pid for one in everyone if not is_gone(one.pid)]:
            if time.monotonic() > deadline_s:
                raise RunError(f"processes {', '.join(map(str, left))} cannot be killed")
            time.sleep(0.05)
    else:
        raise RunError(
            f"{storage.shown(seen.known.url)} has no job to end at once; leave out --now, or kill its process"
        )


def _ask(run: Run, timeout_s: float, say: Say) -> None:
    """Ask a run to save all and end, and wait until it has."""
    where = storage.shown(run.url)
    say(f"asked {where} to save everything and end; waiting for up to {timeout_s:.0f} s")
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        run.ask(CANCEL)  # again and again: a start of the run that finds an old request throws it away
        time.sleep(_POLL_S if storage.local_path(run.url) else 5.0)
        seen = view(run.url)
        if seen.goes_on and not (seen.state in ("queued", "requeued") and _waits(seen)):
            continue
        run.granted(CANCEL)
        if seen.goes_on:  # it was stopped for another reason at the same moment, and waits to be started again
            return _end_now(seen, run, True, deadline_s - time.monotonic(), say)
        return say(f"{where} is {seen.state} at step {seen.known.status.get('step')}: {seen.why}")
    raise RunError(f"{where} has not ended within {timeout_s:.0f} s; the request stays; --now ends it without saving")
