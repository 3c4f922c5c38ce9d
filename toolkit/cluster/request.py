"""What `toolkit submit` and `toolkit supervise` are asked for, as words -> plans."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit import storage
from toolkit.cluster import sweep
from toolkit.cluster.batch import supervise
from toolkit.cluster.logs import show
from toolkit.cluster.monitor import view
from toolkit.cluster.plan import Nodes, Plan
from toolkit.cluster.profile import Profile, load_profile, overridden
from toolkit.cluster.submit import Submission, check, dry_run, folder_for, submit
from toolkit.config import Job, load_job
from toolkit.config.text import dump
from toolkit.errors import JobError, RunError
from toolkit.run import Run

EXECUTORS = ("slurm", "local")


@dataclass(frozen=True)
class Request:
    """What is to be submitted, and how; `asked` are keys of the profile, of which the empty ones say nothing."""

    job: str
    overrides: Sequence[str]
    cluster: str
    executor: str
    nodes: str
    asked: Mapping[str, Any]
    image: str
    sweeps: Sequence[str]
    most_at_once: int | None
    takes_snapshot: bool


def submitted(
    request: Request, environment: Mapping[str, str], screen: Callable[[Job], None], only_shown: bool, waits: bool
) -> list[Run]:
    """Submit, or only show what would be. `screen` raises JobError for a job that names what does not exist.

    Returns the runs, also those that have nothing left to do.
    """
    asked = _submission(request, environment)
    runs = [Run(plan.job.run.dir) for plan in asked.plans]
    submission = replace(asked, plans=check(asked, only_shown))
    if not request.image:  # which may have what is not installed here
        for plan in submission.plans:
            screen(plan.job)
    if only_shown:
        print(dry_run(submission) if submission.plans else "nothing is left to be done")
        return runs
    ids = submit(submission) if submission.plans else []
    for plan, job_id in zip(submission.plans, ids, strict=True):
        print(f"{plan.job.run.name}: queued as job {job_id} in {storage.shown(plan.job.run.dir)}")
    if ids:
        where = storage.shown(submission.plans[0].job.run.dir)
        if request.sweeps:
            print(f"toolkit status {where.rpartition('/')[0]}")
        else:
            print(f"toolkit status {where}   toolkit logs {where} --follow   toolkit cancel {where}")
    for plan in submission.plans if waits else ():
        _await(plan.job.run.dir)
    return runs


def _await(run: str) -> None:
    """Show what a run says, to its end. Raises RunError if it fails, and KeyboardInterrupt after Ctrl-C, of which the
    run learns nothing.
    """
    if show(run, rank=0, attempt=None, onwards=True):
        raise KeyboardInterrupt
    status = Run(run).status() or {}
    if status.get("state") not in ("completed", "preempted", "cancelled"):
        reason = status.get("reason") or "see toolkit status"
        raise RunError(f"{storage.shown(run)} is {view(run).state}: {reason}")


def _submission(request: Request, environment: Mapping[str, str]) -> Submission:
    """As it is asked for, not yet checked against the cluster and the runs there are."""
    if request.executor not in EXECUTORS:
        raise JobError(f"executor is {request.executor!r}; it must be {' or '.join(EXECUTORS)}")
    profile = _profile(request.cluster, request.asked)
    environment = {**environment, **profile.env}  # as the job will have it
    nodes = Nodes.parsed(request.nodes)
    jobs = [_absolute(job) for job in _jobs(request, environment)]
    plans = [Plan(job, profile, nodes, request.image or None) for job in jobs]
    if request.executor == "local" and (nodes != Nodes() or request.image):
        raise JobError("--executor local is this machine alone: leave out --nodes and --container")
    if request.most_at_once is not None and request.most_at_once < 1:
        raise JobError(f"max_parallel (--max-parallel) is {request.most_at_once}; it must be at least 1, or left out")
    if request.most_at_once and (request.executor == "local" or not request.sweeps):
        raise JobError("--max-parallel is for a --sweep on Slurm; here it would do nothing: leave it out")
    root = _absolute(load_job(request.job, request.overrides, environment)) if request.sweeps else jobs[0]
    return Submission(
        plans,
        request.executor,
        folder_for(root, profile.scratch),
        os.getcwd(),
        dump(profile.model_dump(mode="json", exclude_unset=True)),
        request.most_at_once,
        request.takes_snapshot,
    )


def _jobs(request: Request, environment: Mapping[str, str]) -> list[Job]:
    job = load_job(request.job, request.overrides, environment)
    if not request.sweeps:
        return [job]
    points = sweep.points(request.sweeps, job.run.dir)
    return [
        load_job(request.job, [*request.overrides, *point.overrides, job.moved_to(point.dir)], environment)
        for point in points
    ]


def _absolute(job: Job) -> Job:
    """The job with a run directory that means the same from any folder."""
    local = storage.local_path(job.run.dir)
    if local is None or os.path.abspath(local) == job.run.dir:
        return job
    run = job.run.model_copy(update={"dir": os.path.abspath(local)})
    absolute = job.model_copy(update={"run": run})
    absolute._written = {path: text for path, text in job._written.items() if path != ("run", "dir")}
    return absolute


def _profile(path: str, asked: Mapping[str, Any]) -> Profile:
    given = {key: value for key, value in asked.items() if value not in ("", None)}
    return overridden(load_profile(path) if path else Profile(), given)


def supervised(
    job: str, overrides: Sequence[str], cluster: str, nodes: str, image: str, environment: Mapping[str, str]
) -> int:
    """Be the supervisor of the Slurm job that this process belongs to. Returns the run's exit status."""
    profile = _profile(cluster, {})
    environment = {**environment, **profile.env}
    count = nodes or environment.get("SLURM_JOB_NUM_NODES", "1")
    plan = Plan(load_job(job, overrides, environment), _in_job(profile, environment), Nodes.parsed(count),
                image or None)  # fmt: skip
    paths = [job, *([environment["TOOLKIT_CODE"]] if environment.get("TOOLKIT_CODE") else [])]
    debug = ["--debug"] * ("--debug" in sys.argv)
    words = ["train", job, *overrides, *debug]
    return supervise(plan, words, [str(Path(path)) for path in paths], environment)


def _in_job(profile: Profile, environment: Mapping[str, str]) -> Profile:
    """The profile with the GPUs and CPUs that the job has on each node, which sbatch may have been told otherwise."""
    cpus, gpus = environment.get("SLURM_CPUS_PER_TASK", ""), environment.get("SLURM_GPUS_ON_NODE", "")
    has: dict[str, int | None] = {"cpus_per_gpu": None, "cpus_per_node": int(cpus) if cpus.isdecimal() else None}
    if gpus.isdecimal() and profile.gpus_per_node != 0:
        has["gpus_per_node"] = int(gpus)
    return profile.model_copy(update=has)
