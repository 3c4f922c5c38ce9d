"""A job file, overrides and an environment -> a validated `Job`, or one error that lists every problem."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from toolkit.config.problems import report, schema_problems
from toolkit.config.references import References
from toolkit.config.schema import Job
from toolkit.config.text import Path, Problem, dump, parse
from toolkit.errors import JobError


def load_job(path: str, overrides: str | Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> Job:
    """The validated job of a file and its `KEY=VALUE` overrides, of which one may come without a list.

    `${env:NAME}` is replaced from `environment`. Raises JobError that names all problems at once, each with its line,
    what is allowed and the nearest key that exists.
    """
    return job_from_text(_read(path), path, [overrides] if isinstance(overrides, str) else overrides, environment)


def job_from_text(text: str, path: str, overrides: Sequence[str], environment: Mapping[str, str]) -> Job:
    """The validated job of a text that came from `path`."""
    try:
        document = parse(text)
    except ValueError as error:
        raise JobError(f"job file {path}: {error}") from None
    problems = document.problems
    tree = document.value if isinstance(document.value, dict) else {}
    if tree is not document.value:
        problems.append(Problem((), "is not a mapping; a job file starts with keys such as `data:`"))
    origin = {key: f"line {line}" for key, line in document.lines.items()}
    for override in overrides:
        _override(tree, override, origin, problems)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", FilePath(path).stem)
        run.setdefault("dir", "runs/${run.name}")
    resolver = References(tree, environment, problems)
    try:
        job = Job.model_validate(resolver.resolved(tree, ()))
        job._written.update(resolver.written)
    except ValidationError as error:
        found = schema_problems(error.errors(), resolver.written)
        problems += [problem for problem in found if problem.path not in resolver.unresolved]
    if problems:
        raise JobError(report(path, problems, origin))
    return job


@contextmanager
def job_file(job: str | os.PathLike[str] | Job) -> Iterator[str]:
    """The path of a job's file; of a new one, for now, if it has none."""
    if not isinstance(job, Job):
        yield os.fspath(job)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = FilePath(folder, "job.yaml")
        path.write_text(dump(job.as_written()), encoding="utf-8")
        yield str(path)


def _read(path: str) -> str:
    try:
        return FilePath(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = FilePath(path).parent
        near = get_close_matches(FilePath(path).name, [entry.name for entry in folder.glob("*.yaml")], 1)
        hint = (
            f"did you mean {folder / near[0]}?" if near else "give the path of a job file, such as jobs/digits_mlp.yaml"
        )
        raise JobError(f"job file {path} does not exist; {hint}") from None
    except OSError as error:
        raise JobError(f"job file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"job file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _override(tree: dict[str, Any], text: str, origin: dict[Path, str], problems: list[Problem]) -> None:
    """Set one dotted `KEY=VALUE` in the tree; VALUE is YAML, so `data.val={fraction: 0.2}` works."""
    key, equals, value = text.partition("=")
    path: Path = tuple(key.split("."))
    origin[path] = "command line"
    if not equals or not all(path):
        problems.append(Problem(path, f"{text!r} is not an override; write KEY=VALUE, such as train.epochs=3"))
        return
    try:
        document = parse(value)
    except ValueError as error:
        problems.append(Problem(path, f"{value!r}: {error}"))
        return
    problems += [Problem((*path, *problem.path), problem.message) for problem in document.problems]
    node: Any = tree
    for name in path[:-1]:
        if isinstance(node.get(name), str) and path[-2:-1] != (name,):
            node[name] = {"name": node[name]}  # `model: mlp` is short for `model: {name: mlp}`
        elif not isinstance(node.get(name), dict):
            node[name] = {"name": node[name]} if isinstance(node.get(name), str) else {}
        node = node[name]
    node[path[-1]] = document.value
