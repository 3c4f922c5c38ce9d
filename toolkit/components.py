"""A `{name, args}` of the job file -> the object it means. Registries are plain dicts of `module:attribute`."""

import contextlib
import inspect
import json
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from toolkit.errors import JobError, RunError
from toolkit.secret import Secret, as_written


def find(kind: str, name: str, registry: Mapping[str, str]) -> Callable[..., Any]:
    """The constructor a name means: a registry key, or `package.module:attribute` of the user's own code."""
    target = registry.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not colon:
        near = get_close_matches(name, registry, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise JobError(
            f"{kind} {name!r} is unknown; {meant}Known: {', '.join(sorted(registry))}; "
            "or your own, as package.module:attribute"
        )
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise JobError(
            f"{kind} {name!r}: no module named {error.name!r}; it must be importable from the "
            "folder the command runs in"
        ) from error
    except (Exception, SystemExit) as error:
        raise JobError(f"{kind} {name!r}: its module raised {_cause(error)}; mend it, then start again") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise JobError(f"{kind} {name!r}: {error}; check the spelling after the colon") from error
    if not callable(found):
        raise JobError(f"{kind} {name!r} is a {type(found).__name__}, not a class or function")
    return found  # type: ignore[no-any-return]


def build(
    kind: str,
    component: Any,
    registry: Mapping[str, str],
    *positional: Any,
    offers: Mapping[str, Any] | None = None,
) -> Any:
    """Call a constructor with `positional`, the component's args, and those offers it names and the job lacks."""
    constructor = find(kind, component.name, registry)
    args = checked_args(kind, component, constructor, len(positional), offers or {})
    try:
        return constructor(*positional, **args)
    except Exception as error:
        ours = isinstance(error, JobError | RunError)
        words = f": {error}" if ours else f" with {component.args} raised {_cause(error)}"
        of_kind = RunError if isinstance(error, RunError) else JobError
        raise of_kind(f"{kind} {component.name!r}{as_written(words, component.args)}") from error


def checked_args(
    kind: str,
    component: Any,
    constructor: Callable[..., Any],
    positional: int = 0,
    offers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments to call a constructor with. Raises JobError that lists every unknown, missing or ill-typed one."""
    try:
        parameters = list(inspect.signature(constructor).parameters.values())[positional:]
    except ValueError as error:
        raise JobError(f"{kind} {component.name!r}: {error}; wrap it in a function of your own") from error
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    args: dict[str, Any] = {name: value for name, value in (offers or {}).items() if name in named} | component.args
    hints = _hints(constructor)
    problems = []
    for name, value in component.args.items():
        if name in named:
            try:
                args[name] = _typed(value, hints.get(name, Any))
            except ValidationError as error:
                allowed = error.errors()[0]["msg"].removeprefix("Input should be ")
                problems.append(f"argument {name!r} is {value!r}; it must be {allowed}")
        elif not open_ended:
            near = get_close_matches(name, named, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            problems.append(f"unknown argument {name!r}; {meant}Allowed: {', '.join(named) or 'none'}")
    problems += [
        f"argument {name!r} is missing; add it under args"
        for name, p in named.items()
        if p.default is p.empty and name not in args
    ]
    if problems:
        raise JobError("\n".join(f"{kind} {component.name!r}: {problem}" for problem in problems))
    return args


def _hints(constructor: Callable[..., Any]) -> dict[str, Any]:
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    try:
        return get_type_hints(function, include_extras=True)  # bounds, too
    except (NameError, TypeError):  # names that exist for type checkers only: then the constructor judges its arguments
        return {}


def _typed(value: Any, hint: Any) -> Any:
    """The value as the type that the signature declares. Raises ValidationError where it is none."""
    try:
        adapter = TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):  # a type of the user's own: not ours to judge
        return _number(value) if isinstance(value, Secret) else value
    if isinstance(value, Secret):
        typed = adapter.validate_strings(str(value))
        return value if isinstance(typed, str) else typed
    # As JSON, where strict means the declared type but a list may still become a tuple.
    return adapter.validate_json(json.dumps(value), strict=True)


def _number(text: Secret) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _cause(error: BaseException) -> str:
    """`ValueError: message (file, line)` of where the user's code raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
