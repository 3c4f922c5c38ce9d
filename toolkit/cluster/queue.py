"""What became of jobs: from squeue, else scontrol, and for jobs they know no more from sacct; whichever is there.

All processes of one user on one machine share an answer for PERIOD_S, in a file that only the user can read: however
many ask, Slurm is asked once. So it is when Slurm does not answer.
"""

import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.cluster.slurm import AwayError, NoSlurmError, SlurmError, UnknownJobError, all_jobs, ask
from toolkit.errors import RunError

PERIOD_S = 10.0
ACTIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING",
    "SPECIAL_EXIT", "STAGE_OUT", "STOPPED",
}  # fmt: skip
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}

# Why a job waits: Slurm's reason, or how it begins, in words.
_REASONS = {
    "None": "Slurm has not looked at it yet",
    "Resources": "it waits for free nodes",
    "Priority": "other jobs come first",
    "BeginTime": "it may not begin yet: it has just been queued again, or was submitted for later",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "it waits for a job that has failed: cancel it",
    "JobHeldUser": "it is held; let it go with: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
    "JobHoldMaxRequeue": "it was queued again too often, and is held; let it go with: scontrol release",
    "launch failed requeued held": "a node could not start it, and it is held; let it go with: scontrol release",
    "JobArrayTaskLimit": "as many of its sweep run as --max-parallel allows",
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "Nodes required for job are DOWN": "nodes it needs are down, drained or reserved for others",
    "NodeDown": "a node it needs is down",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes no jobs",
    "PartitionNodeLimit": "its partition does not allow so many nodes: cancel it, and ask for fewer",
    "PartitionTimeLimit": "its partition does not allow so long a time: cancel it, and ask for less",
    "PartitionConfig": "its partition does not allow what it asks for",
    "BadConstraints": "no nodes are as it asks for: cancel it",
    "Licenses": "it waits for a licence",
    "Reservation": "it waits for its reservation",
    "InvalidAccount": "its account is not valid: cancel it",
    "InvalidQOS": "its QOS is not valid: cancel it",
    "Cleaning": "what is left of its last start is being removed",
    "QOS": "a limit of its QOS is reached",
    "Assoc": "a limit of its account is reached",
    "MaxCpu": "a limit of its account is reached",
    "MaxMem": "a limit of its account is reached",
    "SystemFailure": "Slurm itself has failed",
}
_SQUEUE = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%r|%S")
_KEPT_AS = 2  # the format of the shared file: another version of this code has another file


@dataclass(frozen=True)
class Entry:
    """What Slurm says of one job, or of one task of an array."""

    state: str  # PENDING, RUNNING, …, or how it has ended: COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, …
    reason: str = ""
    starts_at_s: float | None = None  # since the epoch; of a waiting job, when Slurm expects it to

    @property
    def active(self) -> bool:
        """Whether it is in the queue or runs."""
        return self.state in ACTIVE

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    def why(self) -> str:
        """Why it waits, and until when."""
        words = why(self.reason)
        if self.starts_at_s:
            words += f"; expected to start at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.starts_at_s))}"
        return words


@dataclass(frozen=True)
class Answer:
    """What Slurm says of jobs, as of a moment: it knows those in `entries`; or `problem` says why it says nothing."""

    entries: Mapping[str, Entry]
    at_s: float
    problem: str | None = None
    here: bool = True  # whether this machine has Slurm's commands
    unasked: Sequence[str] = ()  # jobs that Slurm will be asked about when it may be asked again


def why(reason: str) -> str:
    """A reason of Slurm for which a job waits, in words, with Slurm's own after them."""
    known = _REASONS.get(reason.replace("_", " ") if " " not in reason and "_" in reason else reason)
    known = known or next((words for begin, words in _REASONS.items() if reason.startswith(begin)), None)
    return f"{known} ({reason})" if known else f"Slurm's reason: {reason}"


def look(job_ids: Iterable[str]) -> Answer:
    """What is known of these jobs. Costs at most two queries of slurmctld and one of slurmdbd in PERIOD_S."""
    wanted = sorted(set(job_ids))
    if not wanted:
        return Answer({}, time.time())
    with _shared() as kept:
        if not 0 <= time.time() - kept["queue"]["at_s"] < PERIOD_S:
            kept["queue"] = _queue()
        queue, past = kept["queue"], kept["past"]
        unknown = {*wanted, *kept["unasked"]} - queue["found"].keys() - past.keys() - {*queue["asked"]}
        if unknown and not queue["problem"] and not queue["asked"]:
            _ask_more(queue, past, sorted(unknown))
            unknown = set()
        kept["unasked"] = sorted(unknown)  # so that they have their turn, however many others look
        known = past | queue["found"]  # a job that was started again has a past, too
    entries = {job: Entry(*known[job]) for job in wanted if job in known}
    return Answer(entries, queue["at_s"], queue["problem"], queue["here"], kept["unasked"])


def _ask_more(queue: dict[str, Any], past: dict[str, Any], jobs: Sequence[str]) -> None:
    """Add what is known of jobs that are not among this user's: others' may be in the queue, ended ones forgotten."""
    queue["asked"] = jobs
    with suppress(NoSlurmError, UnknownJobError):
        try:
            queue["found"] |= squeued(ask(*_SQUEUE, "--jobs=" + ",".join(jobs)))
        except AwayError as error:
            queue["problem"] = str(error)
    if forgotten := [job for job in jobs if job not in queue["found"]]:
        past |= _accounting(forgotten)


def _queue() -> dict[str, Any]:
    """Every job of this user that slurmctld remembers: those of the last minutes, too."""
    at_s, found, problem, here = time.time(), dict[str, Any](), None, True
    try:
        found = squeued(ask(*_SQUEUE, f"--user={os.getuid()}"))
    except NoSlurmError:
        try:
            found = {facts.job_id: (facts.state, facts.reason, None) for facts in all_jobs()}
        except NoSlurmError:
            here = False
        except SlurmError as error:
            problem = str(error)
    except SlurmError as error:
        problem = str(error)
    return {"at_s": at_s, "found": found, "problem": problem, "here": here, "asked": []}


def squeued(answer: str) -> dict[str, tuple[str, str, float | None]]:
    """Jobs by id from what squeue prints; a running task of an array also by the number that SLURM_JOB_ID has there."""
    found = {}
    for line in answer.splitlines():
        job, number, state, reason, starts_at = line.split("|")
        entry = (state, reason, float(starts_at) if starts_at.isdigit() and state in WAITING else None)
        found[job] = entry
        if state not in WAITING:  # the waiting tasks of an array have one number together
            found.setdefault(number, entry)
    return found


def _accounting(jobs: Sequence[str]) -> dict[str, tuple[str, str, None]]:
    """How jobs have ended that slurmctld has forgotten; nothing where there is no accounting."""
    words = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,JobIDRaw,State,Reason")
    try:
        return accounted(ask(*words, "--jobs=" + ",".join(jobs)))
    except SlurmError:  # it is none of slurmctld's business whether there is accounting, nor of ours
        return {}


def accounted(answer: str) -> dict[str, tuple[str, str, None]]:
    """Ended jobs by id, also by number, from what sacct prints."""
    found = {}
    for line in answer.splitlines():
        job, number, state, reason = line.split("|")[:4]
        if state and state not in ACTIVE:
            found[job] = found[number] = (state.split()[0], reason, None)  # CANCELLED by 1000
    return found


@contextmanager
def _shared() -> Iterator[dict[str, Any]]:
    """What all processes of this user share, theirs alone inside, and kept afterwards."""
    folder = _folder()
    cluster = f"{_KEPT_AS} {os.environ.get('SLURM_CONF')} {os.environ.get('SLURM_CLUSTERS')}"
    path = folder / f"queue-{hashlib.sha256(cluster.encode()).hexdigest()[:16]}.json"
    with open(os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = {"queue": {"at_s": 0.0}, "past": {}, "unasked": []}
        with suppress(FileNotFoundError, ValueError):  # the first time, or a disk that was full
            kept = json.loads(path.read_text())
        yield kept
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(kept, file)
        new.replace(path)


def _folder() -> Path:
    """A folder that no other user can have laid in our way."""
    folder = Path(tempfile.gettempdir()) / f"toolkit-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise RunError(f"{folder} should be a folder of yours alone, and is not; remove it, or set TMPDIR to another")
    return folder
