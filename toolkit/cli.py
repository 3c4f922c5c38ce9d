"""Commands.

Each is a few lines that call a function of another module, imported when the command is run: `--help` imports no torch.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

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


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the run's directory or URL")],
    checkpoint: Annotated[str, typer.Option(help="best, last or a step")] = "last",
    split: Annotated[str, typer.Option(help="val or test")] = "test",
    debug: Debug = False,
) -> None:
    """Exact metrics of one checkpoint of a run, as one line of JSON."""
    from toolkit import session, storage
    from toolkit.config import job_from_text

    url = storage.join(run, "config.yaml")
    try:
        text = storage.read(url).decode()
    except OSError:
        raise JobError(
            f"{run} is no run: it has no config.yaml; give the directory of a run, such as runs/digits_mlp"
        ) from None
    print(json.dumps(session.evaluate(job_from_text(text, url, (), os.environ), run, checkpoint, split)))


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
    from toolkit import supervisor

    sys.path.insert(0, os.getcwd())  # the user's own components are found from here
    supervisor.enter_rank(os.environ)
    status, message = _run()
    if message and supervisor.ATTEMPT_DIR not in os.environ:
        print(message, file=sys.stderr)
    sys.exit(supervisor.leave_rank(os.environ, status, message))


def _run() -> tuple[int, str]:
    """(exit status, message) of the command line."""
    try:
        app()
        return 0, ""
    except SystemExit as done:  # also how a wrong command line ends, its message already shown
        return int(done.code or 0), ""
    except JobError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        status, message = 1, f"{type(error).__name__}: {error} ({where}); with --debug the whole traceback is shown"
    return status, traceback.format_exc() if "--debug" in sys.argv else message
