"""The one door to Slurm's commands: each a list of words, with a time limit, its error in words, and patience for a
slurmctld that is away. What is believed of their answers was tried on Slurm 22.05; see tests/slurm.
"""

import os
import re
import subprocess
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

from toolkit.errors import JobError, RunError

PATIENCE_S = 60.0  # for what must be done, such as a requeue, while slurmctld is away; it restarts within seconds
MAX_HOSTS = 65536  # of one list; Slurm's own limit
REQUEUED, BY_SLURM = "requeued", "requeued by Slurm"

# What the commands say when slurmctld or slurmdbd does not answer; the last is `scontrol requeue` of an array's task.
_AWAY = re.compile(
    "unable to contact slurm controller|connection refused|connection timed out|socket timed out|connect failure|"
    "connection failure|message (send|receive) failure|zero bytes were transmitted|standby mode|"
    "temporarily unavailable|problem talking to the database|unexpected message received",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(r"invalid job id|job \S+ not found", re.IGNORECASE)
# What a user may have set once and for all for sbatch, such as SBATCH_ACCOUNT.
_MAY_BE_LEFT_OPEN = {"account", "partition", "qos", "constraint", "reservation"}
_OF_THE_USER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # which cluster, and who asks; not of a job
# These change what the commands print, or whom they ask about.
_SETTINGS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")


class SlurmError(RunError):
    """A command of Slurm has refused, in its own words."""


class NoSlurmError(SlurmError):
    """There is no such command on this machine."""


class AwayError(SlurmError):
    """Slurm does not answer. It may do so later."""


class UnknownJobError(SlurmError):
    """Slurm knows no such job, or no longer."""


@dataclass(frozen=True)
class JobFacts:
    """What slurmctld says of one job, or of one task of an array."""

    job_id: str  # as commands take it: 123, or 123_4 for a task of an array
    number: str  # as SLURM_JOB_ID has it: of an array's task a number of its own, but of one of them the array's
    state: str  # RUNNING, PENDING, COMPLETING, CANCELLED, …
    reason: str
    can_requeue: bool
    restarts: int
    nodes: tuple[str, ...]
    excluded: tuple[str, ...]
    ends_at_s: float | None  # since the epoch; when it will be ended, be it by its time limit or by preemption
    log: str

    @property
    def requeues(self) -> bool:
        """Whether `scontrol requeue` is for it: it runs, or its time limit ends it, after which Slurm does nothing by
        itself. A job that was cancelled would be brought back to life.
        """
        return self.state in ("RUNNING", "TIMEOUT") or (self.state, self.reason) == ("COMPLETING", "TimeLimit")


def ask(*words: str, timeout_s: float = 20.0, patience_s: float = 0.0) -> str:
    """What a command prints, in English, with times as seconds since the epoch.

    While Slurm does not answer it is asked again, for `patience_s` in all, then AwayError is raised. Raises
    NoSlurmError where there is no such command, UnknownJobError, and SlurmError for every other refusal.
    """
    deadline_s, pause_s = time.monotonic() + patience_s, 0.5
    while True:
        try:
            return _asked(words, timeout_s)
        except AwayError:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 8.0)


def _asked(words: tuple[str, ...], timeout_s: float) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS)}
    environment |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
    what = " ".join(words[:3])
    try:
        done = subprocess.run(
            words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except (FileNotFoundError, PermissionError):
        raise NoSlurmError(f"no {words[0]} here: this machine has no Slurm commands on its PATH") from None
    except subprocess.TimeoutExpired:
        raise AwayError(f"{what}: no answer within {timeout_s:g} s") from None
    if done.returncode == 0:
        return done.stdout.decode(errors="replace")
    said = (done.stderr + done.stdout).decode(errors="replace").strip()  # `scontrol show job 3_9` complains on stdout
    message = f"{what}: {said or f'exit status {done.returncode}'}"
    if _UNKNOWN.search(said):
        raise UnknownJobError(message)
    raise AwayError(message) if _AWAY.search(said) else SlurmError(message)


def require() -> None:
    """Raises JobError where nothing can be submitted."""
    try:
        ask("sbatch", "--version")
    except NoSlurmError:
        raise JobError(
            "no sbatch here: submit on a login node of the cluster, or take --executor local for this machine"
        ) from None


@contextmanager
def as_scripted(options: Container[str]) -> Iterator[None]:
    """Inside, this process's environment has nothing that sbatch would put above what a script says: no variables of a
    job that this is part of, and of SBATCH_* only those for what `options` leaves open.
    """
    before = dict(os.environ)
    for name in before:
        kept = name.removeprefix("SBATCH_").lower()
        ours = name.startswith("SBATCH_") and (kept in options or kept not in _MAY_BE_LEFT_OPEN)
        if ours or (name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in _OF_THE_USER):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def own_job(environment: Mapping[str, str]) -> str | None:
    """The id of the job this process belongs to; of an array, with the task: SLURM_JOB_ID of one of its tasks is the
    array's own, and to requeue or cancel that would be to do so to all of them. None outside Slurm.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def job_facts(job_id: str, patience_s: float = 0.0) -> JobFacts | None:
    """What slurmctld knows of a job; None if it knows none, or no longer: it forgets them minutes after their end."""
    try:
        answer = ask("scontrol", "show", "job", job_id, patience_s=patience_s)
    except UnknownJobError:
        return None
    return next((facts for facts in _records(answer) if job_id in (facts.job_id, facts.number)), None)


def all_jobs() -> list[JobFacts]:
    """Every job that slurmctld knows and this user may see."""
    return _records(ask("scontrol", "show", "job"))


def _records(answer: str) -> list[JobFacts]:
    return [_facts(record) for record in re.split(r"\n(?=JobId=)", answer.strip()) if record.startswith("JobId=")]


def _facts(record: str) -> JobFacts:
    """A record of `scontrol show job`, of several lines: names and paths of users stand at the end of theirs."""

    def value(pattern: str) -> str:
        match = re.search(pattern, record, re.MULTILINE)
        return match[1] if match else ""

    number, array, task = value(r"^JobId=(\d+)"), value(r"^JobId=\d+ ArrayJobId=(\d+)"), value(r"ArrayTaskId=(\S+)")
    ends_at = value(r"^ +StartTime=\S+ EndTime=(\S+)")
    return JobFacts(
        job_id=f"{array}_{task}" if array else number,
        number=number,
        state=value(r"^ +JobState=(\S+)"),
        reason=value(r"^ +JobState=\S+ Reason=(\S+)"),
        can_requeue=value(r"^ +Requeue=(\d)") == "1",
        restarts=int(value(r"^ +Requeue=\d Restarts=(\d+)") or 0),
        nodes=tuple(expand(value(r"^ +NodeList=([^(\s]*)"))),
        excluded=tuple(expand(value(r"ExcNodeList=([^(\s]*)"))),
        ends_at_s=float(ends_at) if ends_at.isdigit() else None,
        log=value(r"^ +StdOut=(.*)$"),
    )


def requeue(job_id: str, restarts: int, patience_s: float = PATIENCE_S) -> str:
    """Have Slurm start a job of this user again that has been started again `restarts` times (SLURM_RESTART_COUNT).

    Returns REQUEUED; BY_SLURM if Slurm has done so itself, as after a preemption; or the state of a job that ends for
    good: COMPLETING, CANCELLED, …, unknown. Raises SlurmError if Slurm refuses, AwayError if it stays away.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        left_s = max(0.0, deadline_s - time.monotonic())
        facts = job_facts(job_id, left_s)
        if facts and (facts.restarts != restarts or facts.state == "PENDING"):
            return BY_SLURM
        if not facts or not facts.requeues:
            return facts.state if facts else "unknown"
        try:
            ask("scontrol", "requeue", job_id)
        except AwayError:  # it may have heard us all the same: look again
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)
        except SlurmError:
            now = job_facts(job_id, left_s)
            if now and (now.state, now.restarts) == (facts.state, restarts):
                raise
        else:
            return REQUEUED


def cancel(job_id: str, patience_s: float = PATIENCE_S) -> None:
    """Have Slurm end a job now, or never begin it. One that has ended is no error."""
    try:
        ask("scancel", job_id, patience_s=patience_s)
    except UnknownJobError:
        return


def expand(nodelist: str) -> list[str]:
    """The hosts of a list such as SLURM_JOB_NODELIST has it: `n[1-3,07-09],gpu-a[1-2]b[3-4],login`.

    A number keeps the leading zeros of the first of its range. Raises ValueError for what is no such list.
    """
    hosts = [host for item in _items(nodelist) for host in _hosts(item)] if nodelist else []
    if len(hosts) > MAX_HOSTS:
        raise ValueError(f"{nodelist!r} has more than {MAX_HOSTS} hosts")
    return hosts


_ITEM = re.compile(r"(?:[^\s,\[\]]|\[[^\s\[\]]*\])+")


def _items(nodelist: str) -> Iterator[str]:
    end = -1
    for match in _ITEM.finditer(nodelist):
        if match.start() != end + 1 or (match.start() and nodelist[end] != ","):
            break
        yield match[0]
        end = match.end()
    if end != len(nodelist):
        raise ValueError(f"{nodelist!r} is no list of hosts such as n[1-3,07-09],login")


def _hosts(item: str) -> Iterator[str]:
    parts = [_numbers(part[1:-1]) if part.startswith("[") else [part] for part in re.split(r"(\[.*?\])", item)]
    count = 1
    for part in parts:
        count *= len(part)
    if count > MAX_HOSTS:
        raise ValueError(f"{item!r} has more than {MAX_HOSTS} hosts")
    return ("".join(words) for words in product(*parts))


def _numbers(group: str) -> list[str]:
    """The numbers of `1-3,07-09`."""
    found: list[str] = []
    for part in group.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"[{group}] is no list of numbers and ranges such as 1-3,07-09")
        first, last = match[1], match[2] or match[1]
        if int(last) - int(first) >= MAX_HOSTS:
            raise ValueError(f"[{group}] has more than {MAX_HOSTS} numbers")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
