"""Commands.

Each is a few lines that call a function of another module, imported when the command is run: `--help` imports no torch.
"""

import atexit
import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import toolkit
from toolkit.config import Job, load_job
from toolkit.errors import JobError, RunError

app = typer.Typer(
    name="toolkit",
    help="One job file becomes one durable run. Starting the same job again resumes it.",
    epilog="Exit status: 0 done; 1 failed; 2 wrong usage or job file; 75 stopped early, all saved: run me again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="the job file, such as jobs/digits_mlp.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the job, such as train.epochs=3")
]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="the run's directory or URL")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="ranks on this machine; default: launch.processes")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over in a new directory beside the old one")] = False,
    debug: Debug = False,
) -> None:
    """Train here, or resume: the run goes on from its newest checkpoint."""
    from toolkit.run import fresh_url
    from toolkit.supervisor import supervise

    changes = list(overrides or [])
    config = load_job(job, changes, os.environ)
    if fresh:
        changes.append(f"run.dir={fresh_url(config.run.dir)}")
        config = load_job(job, changes, os.environ)
    count = _ranks_to_start(processes or config.launch.processes)
    if count > 1:
        raise typer.Exit(supervise(config, ["train", job, *changes, *["--debug"] * debug], count, os.environ))
    raise typer.Exit(_train_as_rank(config))


def _ranks_to_start(wanted: int | str) -> int:
    """How many ranks to start here: 1 where torchrun has already; for "auto" one a GPU in reach, else 1."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys():
        return 1
    if isinstance(wanted, int):
        return wanted
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return max(1, len([entry for entry in Path("/dev").glob("nvidia*") if entry.name[6:].isdigit()]))


def _train_as_rank(config: Job) -> int:
    """Be one rank of a world, or the whole of it. Returns the run's exit status."""
    from toolkit.signals import hold_back

    hold_back()  # importing torch takes seconds
    from toolkit import session
    from toolkit.distributed import ranks_from

    ranks = ranks_from(os.environ)
    result = session.train(config, ranks, Console(quiet=not ranks.leads), sys.argv)
    return 0 if result.state == "completed" else 75


class Executor(StrEnum):
    """Who `toolkit submit` hands a job to."""

    SLURM = "slurm"
    LOCAL = "local"


ClusterFile = Annotated[str, typer.Option(metavar="FILE", help="cluster profile, such as slurm/testbed.yaml")]
NodeCount = Annotated[str, typer.Option(metavar="N|MIN:MAX", help="nodes; of a range as many as there are")]
Image = Annotated[str, typer.Option(metavar="IMAGE", help="container image that the ranks run in")]


@app.command()
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
    from toolkit.cluster.request import Request, submitted

    def screen(config: Job) -> None:
        from toolkit.screening import screen as screened

        screened(config)

    asked = {"gpus_per_node": gpus_per_node, "partition": partition, "account": account, "qos": qos, "time_min": time}
    request = Request(
        job, list(overrides or []), cluster, executor.value, nodes, asked, container, list(sweep or []), max_parallel,
        snapshot,
    )  # fmt: skip
    raise typer.Exit(submitted(request, os.environ, screen, dry_run, wait))


@app.command()
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


@app.command()
def evaluate(
    run: RunUrl,
    checkpoint: Annotated[str, typer.Option(help="best, last or a step")] = "last",
    split: Annotated[str, typer.Option(help="val or test")] = "test",
    debug: Debug = False,
) -> None:
    """Exact metrics of one checkpoint of a run, as one line of JSON."""
    from toolkit.evaluation import evaluate as evaluated

    print(json.dumps(evaluated(_job_of(run), run, checkpoint, split)))


class Action(StrEnum):
    """What `toolkit checkpoints` can do."""

    LS = "ls"
    VERIFY = "verify"
    PRUNE = "prune"
    EXPORT = "export"
    SAVE_NOW = "save-now"


@app.command()
def checkpoints(
    run: RunUrl,
    action: Annotated[
        Action,
        typer.Argument(
            help="list them; read every byte of all; remove what checkpoint.keep does not keep; "
            "write a model as safetensors; have a running run save"
        ),
    ] = Action.LS,
    checkpoint: Annotated[str, typer.Option(help="verify, export: best, last or a step")] = "",
    to: Annotated[str, typer.Option(metavar="FILE", help="export: default model.safetensors in the run")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="export: the weights as trained, not their average (EMA)")] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="save-now: how long to wait for the save")] = 300,
    debug: Debug = False,
) -> None:
    """List, verify, prune or export a run's checkpoints, or have one saved now."""
    from toolkit import inspection

    job = _job_of(run)
    if action == Action.LS:
        inspection.list_all(run, job, Console())
    elif action == Action.VERIFY:
        raise typer.Exit(inspection.verify(run, job, checkpoint, Console()))
    elif action == Action.PRUNE:
        inspection.prune(run, job, Console())
    elif action == Action.EXPORT:
        inspection.export_model(run, job, checkpoint or "last", to, not raw, Console())
    else:
        inspection.save_now(run, timeout_s, Console())


@app.command()
def fork(
    run: RunUrl,
    overrides: Overrides = None,
    at: Annotated[str, typer.Option(metavar="STEP", help="a step, best or last")] = "last",
    debug: Debug = False,
) -> None:
    """Make a new run from a checkpoint of another, with a changed job; start it with `toolkit train`."""
    from toolkit.fork import fork as forked

    print(forked(run, at, list(overrides or []), os.environ))


@app.command()
def verify_resume(
    job: JobFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="ranks of the undisturbed run")] = 1,
    other: Annotated[int, typer.Option(min=1, help="ranks for the second comparison")] = 2,
    kills: Annotated[int, typer.Option(min=1, help="kill -9 in each disturbed run")] = 3,
    seed: Annotated[int, typer.Option(help="decides when the kills come")] = 0,
    folder: Annotated[
        str, typer.Option("--in", metavar="DIR", help="keep the runs here; default: a folder that goes")
    ] = "",
    debug: Debug = False,
) -> None:
    """Prove on your own job that kill -9 and resume change nothing: samples, weights and metrics are compared."""
    from toolkit.proof import Plan, prove

    plan = Plan(job, tuple(overrides or ()), processes, other, kills, seed)
    raise typer.Exit(prove(plan, load_job(job, overrides or (), os.environ), folder, os.environ, Console()))


@app.command()
def status(
    where: Annotated[str, typer.Argument(metavar="[RUN|ROOT]", help="a run, or what runs lie in")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    debug: Debug = False,
) -> None:
    """How a run is doing, or all runs in a directory, the best first; why it waits, if it does."""
    from toolkit.cluster.report import show

    show(where, as_json, Console())


@app.command()
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


@app.command()
def cancel(
    run: RunUrl,
    timeout_s: Annotated[float, typer.Option(min=1, help="how long to wait for its end")] = 300,
    now: Annotated[bool, typer.Option("--now", help="end it at once, without saving")] = False,
    debug: Debug = False,
) -> None:
    """Take a waiting run from the queue, or have a running one save everything and end; it is not started again."""
    from toolkit.cluster.cancel import cancel as cancelled

    cancelled(run, timeout_s, now, print)


def _job_of(run: str) -> Job:
    """The job that a run was made for."""
    from toolkit import storage
    from toolkit.config import job_from_text

    url = storage.join(run, "config.yaml")
    try:
        text = storage.read(url).decode()
    except (FileNotFoundError, NotADirectoryError):
        where, remedy = storage.shown(run), "give the directory of a run, such as runs/digits_mlp"
        raise JobError(f"{where} is no run: it has no config.yaml; {remedy}") from None
    except OSError as error:
        raise JobError(f"{storage.shown(run)} cannot be read: {error}") from None
    return job_from_text(text, url, (), os.environ)


@app.command()
def schema() -> None:
    """The JSON Schema of the job file."""
    print(json.dumps(Job.model_json_schema(), indent=2))


def _version(wanted: bool) -> None:
    if wanted:
        print(toolkit.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `toolkit` command: errors become one block on stderr and an exit status."""
    sys.path.insert(0, os.environ.get("TOOLKIT_CODE") or os.getcwd())  # the user's own components are found from here
    watched = "TOOLKIT_ATTEMPT_DIR" in os.environ  # a rank of our supervisor, which `--help` need not import
    if watched:
        from toolkit import rank as note

        note.enter(os.environ)
    status, message, rank = _run()
    if watched:
        status = note.leave(os.environ, status, message, rank)
    elif message:
        print(message, file=sys.stderr)
    _exit(status)


def _exit(status: int) -> NoReturn:
    """End, a rank at once: gloo's threads may abort a process that Python takes apart, and its status would be lost."""
    if "RANK" not in os.environ:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run() -> tuple[int, str, int | None]:
    """(exit status, message, which rank is to blame if every one says the same) of the command line."""
    try:
        app()
        return 0, "", None
    except SystemExit as done:  # also how a wrong command line ends, its message already shown
        return int(done.code or 0), "", None
    except Exception as error:
        status, message = _told(error)
        return status, traceback.format_exc() if "--debug" in sys.argv else message, getattr(error, "rank", None)


def _told(error: Exception) -> tuple[int, str]:
    """(exit status, message) of what has ended a command."""
    if isinstance(error, JobError | RunError):
        return 2 if isinstance(error, JobError) else 1, str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}"
    return 1, f"{type(error).__name__}: {error} ({where}); with --debug the whole traceback is shown"
