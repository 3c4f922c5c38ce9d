"""A job file, overrides and an environment -> a validated `Job`, or one error that lists every problem."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from toolkit.config.schema import Component, Job
from toolkit.config.text import Path, Problem, parse, scalar
from toolkit.errors import JobError

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
MAX_REFERENCES = 1000  # counting those that references lead to, which can double from key to key


def load_job(path: str, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Job:
    """The validated job of a file and its `KEY=VALUE` overrides. Raises JobError that names all problems at once."""
    return job_from_text(_read(path), path, overrides, environment or {})


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
    resolver = _Resolver(tree, environment, problems)
    try:
        job = Job.model_validate(resolver.resolved(tree, ()))
        job._written.update(resolver.written)
    except ValidationError as error:
        found = _schema_problems(error.errors(), resolver.written)
        problems += [problem for problem in found if problem.path not in resolver.unresolved]
    if problems:
        raise JobError(_report(path, problems, origin))
    return job


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


class _Secret(str):
    """A text from the environment: an error message that shows it with `repr` shows what the file says instead."""

    written = ""

    def __repr__(self) -> str:
        return repr(self.written)


class _Resolver:
    """Replaces `${env:NAME}` and `${section.key}`, and remembers the texts that must be stored as written."""

    def __init__(self, tree: Any, environment: Mapping[str, str], problems: list[Problem]) -> None:
        self.tree, self.environment, self.problems = tree, environment, problems
        self.written: dict[Path, str] = {}
        self.unresolved: set[Path] = set()
        self.left = MAX_REFERENCES

    def resolved(self, node: Any, path: Path) -> Any:
        if isinstance(node, dict):
            return {key: self.resolved(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.resolved(value, (*path, index)) for index, value in enumerate(node)]
        if not isinstance(node, str) or "${" not in node:
            return node
        secret: list[str] = []
        try:
            value = self._text(node, secret, (), typed=_declared(path) is not str)
        except ValueError as error:
            self.problems.append(Problem(path, f"{node!r}: {error}"))
            self.unresolved.add(path)
            return None
        if secret:
            self.written[path] = node
            if isinstance(value, str):
                value = _Secret(value)
                value.written = node
        return value

    def _text(self, text: str, secret: list[str], seen: tuple[str, ...], typed: bool) -> Any:
        """The text with its references replaced; a `typed` one that is nothing but a reference may be a number."""
        whole = _REFERENCE.fullmatch(text) if typed else None
        if whole:
            return self._reference(whole[1], secret, seen, typed)
        return _REFERENCE.sub(lambda match: str(self._reference(match[1], secret, seen, typed=False)), text)

    def _reference(self, name: str, secret: list[str], seen: tuple[str, ...], typed: bool) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {MAX_REFERENCES} references in all; write values out")
        if name.startswith("env:"):
            secret.append(name)
            if name[4:] not in self.environment:
                raise ValueError(f"the environment has no {name[4:]}; set it before the run starts")
            value = self.environment[name[4:]]
            return scalar(value) if typed else value
        if name in seen:
            raise ValueError(f"${{{name}}} refers to itself; write the value out")
        node: Any = self.tree
        for key in name.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        if node is None or isinstance(node, dict | list):
            raise ValueError(
                f"${{{name}}} names no value of this file; use ${{env:NAME}} or a key such as ${{run.name}}"
            )
        return self._text(node, secret, (*seen, name), typed) if isinstance(node, str) else node


def _schema_problems(errors: Sequence[ErrorDetails], written: Mapping[Path, str]) -> list[Problem]:
    """pydantic's errors in our words; the alternatives of one value (`int or 'auto'`) become one problem."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_key_path(error), []).append(error)
    return [Problem(path, _words(path, group, written)) for path, group in by_path.items()]


def _key_path(error: ErrorDetails) -> Path:
    """The part of pydantic's location that is keys of the file: its tags of alternatives are dropped."""
    loc = error["loc"]
    key = loc[-1:] if error["type"] in ("extra_forbidden", "missing") or loc[-2:] == ("fraction", "fraction") else ()
    tags = {"fraction", "component", "int", "float", "literal['auto']", "constrained-int", "constrained-float"}
    sections = loc[: len(loc) - len(key)]
    return (*(part for part in sections if part not in tags and "[" not in str(part)), *key)


def _words(path: Path, group: Sequence[ErrorDetails], written: Mapping[Path, str]) -> str:
    first = group[0]
    field = _field(path)
    about = f" ({field})" if field else ""
    if first["type"] == "extra_forbidden":
        return _unknown_key(path)
    if first["type"] == "missing":
        return f"is missing{about}"
    given = _as_written(first["input"], path, written)
    allowed = " or ".join(dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in group))
    if first["type"] == "value_error":
        return allowed.removeprefix("Value error, ")
    return f"{given!r} is not allowed; it must be {allowed}{about}"


def _as_written(value: Any, path: Path, written: Mapping[Path, str]) -> Any:
    """A value for an error message: what came from the environment is shown as the file has it."""
    if isinstance(value, dict):
        return {key: _as_written(item, (*path, key), written) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item, (*path, index), written) for index, item in enumerate(value)]
    return written.get(path, value)


def _section(path: Path) -> type[BaseModel] | None:
    """The schema's section at a path, or None where the path leads to a plain value."""
    section: type[BaseModel] | None = Job
    for key in path:
        if isinstance(key, int) or section is None:
            continue
        info = section.model_fields.get(key)
        section = _inner_model(info.annotation) if info else None
    return section


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = [model for argument in get_args(annotation) if (model := _inner_model(argument))]
    return Component if Component in models else next(iter(models), None)


def _info(path: Path) -> FieldInfo | None:
    section = _section(path[:-1]) if path else None
    return section.model_fields.get(str(path[-1])) if section else None


def _field(path: Path) -> str:
    info = _info(path)
    return info.description or "" if info else ""


def _declared(path: Path) -> Any:
    """The type that the schema gives a key, or None for one of which it knows nothing."""
    info = _info(path)
    return info.annotation if info else None


def _unknown_key(path: Path) -> str:
    section = _section(path[:-1])
    if section is None:
        return "is an unknown key"
    key, known = str(path[-1]), sorted(section.model_fields)
    if section is Component:
        return f"is an unknown key; arguments go under {_dotted((*path[:-1], 'args', key))}"
    near = get_close_matches(key, known, 1)
    elsewhere = get_close_matches(key.rsplit(".", maxsplit=1)[-1], _ALL_KEYS, 1, cutoff=0.8)
    if near:
        return f"is an unknown key; did you mean {near[0]!r}? Allowed: {', '.join(known)}"
    if elsewhere:
        return f"is an unknown key here; did you mean {_ALL_KEYS[elsewhere[0]]}? Allowed: {', '.join(known)}"
    return f"is an unknown key. Allowed: {', '.join(known)}"


def _leaves(section: type[BaseModel], path: Path) -> dict[str, str]:
    leaves: dict[str, str] = {}
    for name, info in section.model_fields.items():
        inner = _inner_model(info.annotation)
        leaves |= _leaves(inner, (*path, name)) if inner and inner is not Component else {name: _dotted((*path, name))}
    return leaves


def _dotted(path: Path) -> str:
    return ".".join(str(key) for key in path)


_ALL_KEYS = _leaves(Job, ()) | {"lr": "optimizer.args.lr", "batch_size": "data.global_batch_size"}


def _report(path: str, problems: Sequence[Problem], origin: Mapping[Path, str]) -> str:
    lines = [f"job file {path} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"]
    for problem in problems:
        where = next((origin[p] for n in range(len(problem.path), -1, -1) if (p := problem.path[:n]) in origin), "")
        lines.append(f"  {where}{': ' if where else ''}{_dotted(problem.path) or 'the file'}: {problem.message}")
    return "\n".join(lines)
