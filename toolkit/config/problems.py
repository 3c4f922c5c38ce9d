"""What is wrong with a job file, or with another file that has a schema, in words: the key, what was given, what is
allowed, the nearest key that exists.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from toolkit.config.schema import Component, Job
from toolkit.config.text import Path, Problem


def schema_problems(
    errors: Sequence[ErrorDetails], written: Mapping[Path, str], root: type[BaseModel] = Job
) -> list[Problem]:
    """pydantic's errors in our words; the alternatives of one value (`int or 'auto'`) become one problem."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_key_path(error), []).append(error)
    return [Problem(path, _words(path, group, written, root)) for path, group in by_path.items()]


def _key_path(error: ErrorDetails) -> Path:
    """The part of pydantic's location that is keys of the file: its tags of alternatives are dropped."""
    loc = error["loc"]
    key = loc[-1:] if error["type"] in ("extra_forbidden", "missing") or loc[-2:] == ("fraction", "fraction") else ()
    tags = {"fraction", "component", "int", "float", "literal['auto']", "constrained-int", "constrained-float"}
    sections = loc[: len(loc) - len(key)]
    return (*(part for part in sections if part not in tags and "[" not in str(part)), *key)


def _words(path: Path, group: Sequence[ErrorDetails], written: Mapping[Path, str], root: type[BaseModel]) -> str:
    first = group[0]
    field = _field(path, root)
    about = f" ({field})" if field else ""
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, root)
    if first["type"] == "missing":
        return f"is missing{about}"
    given = _as_written(first["input"], path, written)
    allowed = " or ".join(dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in group))
    allowed = allowed.replace("String should match pattern", "text of the form").replace(
        "String should have", "text of"
    )
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


def _section(path: Path, root: type[BaseModel]) -> type[BaseModel] | None:
    """The schema's section at a path, or None where the path leads to a plain value."""
    section: type[BaseModel] | None = root
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


def _info(path: Path, root: type[BaseModel]) -> FieldInfo | None:
    section = _section(path[:-1], root) if path else None
    return section.model_fields.get(str(path[-1])) if section else None


def _field(path: Path, root: type[BaseModel]) -> str:
    info = _info(path, root)
    return info.description or "" if info else ""


def declared(path: Path) -> Any:
    """The type that the schema of the job file gives a key, or None for one of which it knows nothing."""
    info = _info(path, Job)
    return info.annotation if info else None


def _unknown_key(path: Path, root: type[BaseModel]) -> str:
    section = _section(path[:-1], root)
    if section is None:
        return "is an unknown key"
    key, known = str(path[-1]), sorted(section.model_fields)
    near = get_close_matches(key, known, 1)
    if issubclass(section, Component) and not near:
        return f"is an unknown key; arguments go under {_dotted((*path[:-1], 'args', key))}"
    elsewhere = get_close_matches(key.rsplit(".", maxsplit=1)[-1], _ALL_KEYS, 1, cutoff=0.8) if root is Job else []
    if near:
        return f"is an unknown key; did you mean {near[0]!r}? Allowed: {', '.join(known)}"
    if elsewhere:
        return f"is an unknown key here; did you mean {_ALL_KEYS[elsewhere[0]]}? Allowed: {', '.join(known)}"
    return f"is an unknown key. Allowed: {', '.join(known)}"


def _leaves(section: type[BaseModel], path: Path) -> dict[str, str]:
    leaves: dict[str, str] = {}
    for name, info in section.model_fields.items():
        inner = _inner_model(info.annotation)
        if inner and not issubclass(inner, Component):
            leaves |= _leaves(inner, (*path, name))
        else:
            leaves[name] = _dotted((*path, name))
    return leaves


def _dotted(path: Path) -> str:
    return ".".join(str(key) for key in path)


_ALL_KEYS = _leaves(Job, ()) | {"lr": "optimizer.args.lr", "batch_size": "data.global_batch_size"}


def report(path: str, problems: Sequence[Problem], origin: Mapping[Path, str], kind: str = "job file") -> str:
    lines = [f"{kind} {path} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"]
    for problem in problems:
        where = next((origin[p] for n in range(len(problem.path), -1, -1) if (p := problem.path[:n]) in origin), "")
        lines.append(f"  {where}{': ' if where else ''}{_dotted(problem.path) or 'the file'}: {problem.message}")
    return "\n".join(lines)
