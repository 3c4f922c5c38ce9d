"""In the batch step of a Slurm job, outside any container: the supervisor of a run over the job's nodes."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from toolkit import storage
from toolkit.cluster import partitions, slurm
from toolkit.cluster.allocation import TWICE, Allocation
from toolkit.cluster.deadline import Deadline
from toolkit.cluster.memory import Memory
from toolkit.cluster.plan import Plan
from toolkit.console import say
from toolkit.errors import JobError
from toolkit.lock import holder_of
from toolkit.process import be_subreaper
from toolkit.run import Run
from toolkit.signals import StopSignals, hold_back
from toolkit.standing import asked_to_end, complained, says_complete
from toolkit.supervisor import Supervisor

MOST = 3  # times that a job is queued again with no new checkpoint in between
SAID_S = 300.0  # between two words on a slurmctld that is away when the job is to be queued again


def supervise(plan: Plan, words: Sequence[str], paths: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `toolkit WORDS` on the ranks of this job's nodes, and have the job queued again if time or nodes run out.

    `paths` must be seen by every node. Returns the run's exit status.
    """
    signals = StopSignals().listen()
    be_subreaper()
    job_id, run = slurm.own_job(environment), Run(plan.job.run.dir)
    if job_id is None:
        raise JobError("this is no Slurm job; use toolkit submit, or toolkit train for this machine")
    memory, restarts = Memory(run, job_id), int(environment.get("SLURM_RESTART_COUNT", "0"))
    try:
        if says_complete(plan.job):
            return 0
        seen = _seen(plan, paths)
    except OSError as error:  # the store is away, for longer than it is waited for
        say(f"WARNING: {error}", error=True)
        return _again(run, job_id, memory, restarts, [])
    deadline = Deadline(signals, partial(_ends_at_s, job_id), partial(_status, run), plan.profile.signal_lead_s)
    allocation = Allocation(plan, job_id, memory, environment, seen, deadline.warn)
    outcome = Supervisor(plan.job, words, environment, deadline.listen(), allocation, was_started=restarts > 0).run()
    out_of_time = deadline.received and outcome.status not in (0, 2)
    if (out_of_time or allocation.short) and not asked_to_end(run):
        return _again(run, job_id, memory, restarts, _to_exclude(plan, memory), counts=not deadline.preempted)
    if outcome.status == 2:
        _refused(run, outcome.message)
    return outcome.status


def _seen(plan: Plan, paths: Sequence[str]) -> list[str]:
    """What every node must see: the run, if it is a folder, where the job was submitted, and what it needs."""
    local = storage.local_path(plan.job.run.dir)
    if local:
        os.makedirs(local, exist_ok=True)
    return [os.path.abspath(path) for path in dict.fromkeys([*([local] if local else []), os.getcwd(), *paths])]


def _refused(run: Run, message: str) -> None:
    """Note what ranks were refused for, who write nothing then: nobody may wait for a run that will not come, nor see
    only how it ended before. A run that is over stays so.
    """
    with complained():
        if not holder_of(run.at("lock")) and _status(run).get("state") not in ("completed", "cancelled"):
            run.mark("failed", reason=message, exit=2)


def _ends_at_s(job_id: str) -> float | None:
    try:
        facts = slurm.job_facts(job_id)
    except slurm.SlurmError as error:
        say(f"WARNING: {error}", error=True)
        return None
    return facts.ends_at_s if facts else None


def _status(run: Run) -> dict[str, Any]:
    with suppress(OSError, JobError):
        return run.status() or {}
    return {}


def _again(run: Run, job_id: str, memory: Memory, restarts: int, bad: Sequence[str], counts: bool = True) -> int:
    """Have the job queued again, and be ended by Slurm for that. Returns 1 if nothing would come of it.

    `bad` are nodes that it must not get again; `counts` is whether this is the job's own doing.
    """
    if counts and (count := memory.requeued()) > MOST:
        words = (
            f"job {job_id} was queued again {count - 1} times with no new checkpoint in between: give it more time "
            "(--time), save more often (checkpoint.every_steps), or find out what it waits for at its start"
        )
        run.mark("failed", reason=words, exit=1)
        say(words, error=True)
        return 1
    hold_back()  # from here on TERM is what we have asked for, also to the commands that are started here
    try:
        became = _requeue(job_id, restarts)
    except slurm.SlurmError as error:  # such as a job of salloc
        say(f"WARNING: not queued again: {error}; the same command goes on from here", error=True)
        return 75
    if became == slurm.REQUEUED:
        say(f"job {job_id} is queued again, to go on from the newest checkpoint")
        _exclude(job_id, bad)
        time.sleep(60)  # Slurm ends this within KillWait
    elif became == slurm.BY_SLURM:
        say(f"job {job_id} is queued again by Slurm itself, to go on from the newest checkpoint")
    else:
        say(f"job {job_id} is {became}, and not queued again; the same command goes on from here")
    return 75


def _requeue(job_id: str, restarts: int) -> str:
    """As `slurm.requeue`, however long slurmctld is away: nobody else would do it, and there is nothing else to do."""
    while True:
        try:
            return slurm.requeue(job_id, restarts, SAID_S)
        except slurm.AwayError as error:
            say(f"WARNING: job {job_id} is to be queued again, and Slurm is waited for: {error}", error=True)


def _to_exclude(plan: Plan, memory: Memory) -> list[str]:
    """The nodes that have failed twice, in whatever job of the run, if one of its partitions has enough others."""
    bad = sorted(host for host, count in memory.failures.items() if count >= TWICE)
    names = (plan.profile.partition or "").split(",")
    with suppress(slurm.SlurmError):
        ours = [one for one in partitions.partitions() or [] if one.name in names or (names == [""] and one.default)]
        there = max((one.fitting(plan.asked()) for one in ours), default=0)  # they may have the same nodes
        return bad if there >= plan.nodes.least + len(bad) else []
    return []


def _exclude(job_id: str, bad: Sequence[str]) -> None:
    """Ask Slurm for other nodes than these, beside those excluded already. It takes that of a job only once that is
    queued again.
    """
    if not bad:
        return
    try:
        facts = slurm.job_facts(job_id, patience_s=5)
        hosts = sorted({*bad, *(facts.excluded if facts else ())})
        slurm.ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(hosts)}", patience_s=5)
    except slurm.SlurmError as error:
        say(f"WARNING: {error}", error=True)
    else:
        say(f"without node {', '.join(bad)}, which has failed twice")
