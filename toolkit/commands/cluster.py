"""Commands that submit jobs, and watch them."""

import os
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from toolkit.commands.options import Debug, JobFile, Overrides, RunUrl


class Executor(StrEnum):
    """Who `toolkit submit` hands a job to."""

    SLURM = "slurm"
    LOCAL = "local"


ClusterFile = Annotated[str, typer.Option(metavar="FILE", help="cluster profile, such as slurm/testbed.yaml")]
NodeCount = Annotated[str, typer.Option(metavar="N|MIN:MAX", help="nodes; of a range as many as there are")]
Image = Annotated[str, typer.Option(metavar="IMAGE", help="container image that the ranks run in")]


def submit(
    job: JobFile,
    overrides: Overrides = None,
    cluster: ClusterFile = "",
    executor: Annotated[Executor, typer.Option(help="Slurm, or this machine, in the background")] = Executor.SLURM,
    nodes: NodeCount = "1",
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="and as many ranks; over the profile's")] = None,
    partition: Annotated[str, typer.Option(help="over the profile's, as are those that follow")] = "",
    account: Annotated[str, typer.Option(help="who pays")] = "",
    qos: Annotated[str, typer.Option(help="quality of service")] = "",
    time: Annotated[
        int | None, typer.Option(metavar="MIN", min=1, help="minutes until it is saved and requeued")
    ] = None,
    container: Image = "",
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,C", help="a run for each value; repeated: for each pair")
    ] = None,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="runs of a sweep at a time")] = None,
    snapshot: Annotated[bool, typer.Option(help="set the code aside, as it is now")] = True,
    wait: Annotated[bool, typer.Option("--wait", help="show its log, and end as it ends")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script and commands; write nothing")] = False,
    debug: Debug = False,
) -> None:
    """Hand a job to Slurm, or to this machine in the background; it survives whatever ends it, and resumes."""
    from toolkit.submission import submit as submitted

    try:
        runs = submitted(
            job, *(overrides or ()), cluster=cluster, executor=executor.value, nodes=nodes, gpus_per_node=gpus_per_node,
            partition=partition, account=account, qos=qos, time_min=time, container=container, sweep=sweep or (),
            max_parallel=max_parallel, snapshot=snapshot, wait=wait, dry_run=dry_run,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if wait:
        raise typer.Exit(max(int((run.status() or {}).get("exit", 0)) for run in runs))


def supervise(
    job: JobFile,
    overrides: Overrides = None,
    cluster: ClusterFile = "",
    nodes: NodeCount = "",
    container: Image = "",
    debug: Debug = False,
) -> None:
    """Inside a Slurm job (sbatch, salloc): run a job's ranks over its nodes, watch them, have the job queued again."""
    from toolkit.cluster.request import supervised

    raise typer.Exit(supervised(job, list(overrides or []), cluster, nodes, container, os.environ))


def status(
    where: Annotated[str, typer.Argument(metavar="[RUN|ROOT]", help="a run, or what runs lie in")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    debug: Debug = False,
) -> None:
    """How a run is doing, or all runs in a directory, the best first; why it waits, if it does."""
    from toolkit.cluster.report import show

    show(where, as_json, Console())


def logs(
    run: RunUrl,
    rank: Annotated[int, typer.Option(min=0, help="whose log")] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="default: the newest")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run is over")] = False,
    debug: Debug = False,
) -> None:
    """What a rank of a run says."""
    from toolkit.cluster.logs import show

    raise typer.Exit(show(run, rank, attempt, follow))


def cancel(
    run: RunUrl,
    timeout_s: Annotated[float, typer.Option(min=1, help="how long to wait for its end")] = 300,
    now: Annotated[bool, typer.Option("--now", help="end it at once, without saving")] = False,
    debug: Debug = False,
) -> None:
    """Take a waiting run from the queue, or have a running one save everything and end; it is not started again."""
    from toolkit.cluster.cancel import cancel as cancelled

    cancelled(run, timeout_s, now, print)
