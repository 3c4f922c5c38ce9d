"""`toolkit.submit`: from a program of one's own to a cluster. The command of that name calls it."""

import os
from collections.abc import Sequence

from toolkit.cluster.request import Request, submitted
from toolkit.config import Job, job_file
from toolkit.results import Run


def submit(
    job: str | os.PathLike[str] | Job,
    *overrides: str,
    cluster: str = "",
    executor: str = "slurm",
    nodes: int | str = 1,
    gpus_per_node: int | None = None,
    partition: str = "",
    account: str = "",
    qos: str = "",
    time_min: int | None = None,
    container: str = "",
    sweep: str | Sequence[str] = (),
    max_parallel: int | None = None,
    snapshot: bool = True,
    wait: bool = False,
    dry_run: bool = False,
) -> list[Run]:
    """Hand the run of a job to Slurm, or to this machine in the background; it survives whatever ends it, and resumes.

    `job` is a job file, changed by `overrides` such as "train.epochs=3", or a Job. `cluster` is the file of a cluster
    profile, over which go those of the arguments from `gpus_per_node` to `time_min` that are given. `executor` is
    "slurm" or "local", `nodes` a number or "MIN:MAX", `container` an image, `sweep` one or more "KEY=A,B,C". The code
    in the current folder is set aside as it is now, unless `snapshot` is false.

    Returns as soon as Slurm has the job: the run, or one for each point of the sweep, also those that were complete
    already and are not queued. With `wait`, it shows what rank 0 says and returns when all have ended; an interrupt
    ends the waiting, not the runs. With `dry_run`, it prints script and commands, and does nothing.

    Raises JobError, with nothing queued or written, if the job, the profile or an argument is wrong or the cluster
    could never run it; RunError if a run that is waited for fails.
    """
    asked = {"gpus_per_node": gpus_per_node, "partition": partition, "account": account, "qos": qos,
             "time_min": time_min}  # fmt: skip
    with job_file(job) as path:
        sweeps = [sweep] if isinstance(sweep, str) else list(sweep)
        request = Request(
            path, overrides, cluster, executor, str(nodes), asked, container, sweeps, max_parallel, snapshot
        )
        return [Run(run.url) for run in submitted(request, os.environ, _screen, dry_run, wait)]


def _screen(job: Job) -> None:
    from toolkit.screening import screen  # which imports torch, and a login node may do without, if there is an image

    screen(job)
