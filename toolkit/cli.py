"""The `toolkit` command: `train`, and how every command ends. The others are in toolkit/commands/."""

import atexit
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import toolkit
from toolkit.commands import cluster, data, runs
from toolkit.commands.options import Debug, JobFile, Overrides
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
    from toolkit.signals import hold_back
    from toolkit.standing import says_complete
    from toolkit.supervisor import supervise

    hold_back()  # reading the store and importing torch take seconds
    changes = list(overrides or [])
    config = load_job(job, changes, os.environ)
    if fresh:
        changes.append(config.moved_to(fresh_url(config.run.dir)))
        config = load_job(job, changes, os.environ)
    if "RANK" not in os.environ and says_complete(config):
        raise typer.Exit
    count = _ranks_to_start(processes or config.launch.processes)
    words = ["train", job, *changes, *["--debug"] * debug]
    raise typer.Exit(supervise(config, words, count, os.environ) if count > 1 else _train_as_rank(config))


def _ranks_to_start(wanted: int | str) -> int:
    """How many ranks to start here: 1 where torchrun has already; for "auto" one a GPU in reach, else 1."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys():
        return 1
    if isinstance(wanted, int):
        return wanted
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return max(1, len([entry for entry in Path("/dev").glob("nvidia*") if entry.name[6:].isdigit()]))


def _train_as_rank(config: Job) -> int:
    """Be one rank of a world, or the whole of it. Returns the run's exit status."""
    from toolkit import session
    from toolkit.distributed import ranks_from

    ranks = ranks_from(os.environ)
    result = session.train(config, ranks, Console(quiet=not ranks.leads), sys.argv)
    return 0 if result.state == "completed" else 75


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


for command in (cluster.submit, cluster.status, cluster.logs, cluster.cancel, runs.evaluate, runs.checkpoints,
                runs.fork, runs.verify_resume, data.fetch, cluster.supervise):  # fmt: skip
    app.command()(command)


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
