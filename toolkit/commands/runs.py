"""Commands on runs and their checkpoints."""

import json
import os
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from toolkit.commands.options import Debug, JobFile, Overrides, RunUrl
from toolkit.config import Job, load_job


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


def fork(
    run: RunUrl,
    overrides: Overrides = None,
    at: Annotated[str, typer.Option(metavar="STEP", help="a step, best or last")] = "last",
    debug: Debug = False,
) -> None:
    """Make a new run from a checkpoint of another, with a changed job; start it with `toolkit train`."""
    from toolkit.fork import fork as forked

    print(forked(run, at, list(overrides or []), os.environ))


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


def _job_of(run: str) -> Job:
    """The job that a run was made for."""
    from toolkit.results import Run

    return Run(run).job()
