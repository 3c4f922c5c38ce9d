"""What commands have in common on their command lines."""

from typing import Annotated

import typer

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="the job file, such as jobs/digits_mlp.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the job, such as train.epochs=3")
]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="the run's directory or URL")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
