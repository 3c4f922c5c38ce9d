"""`--sweep KEY=A,B,C` -> points: each a list of overrides and a run directory of its own."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from toolkit.config.text import parse, quoted, scalar
from toolkit.errors import JobError

MAX_POINTS = 1000
MAX_NAME = 80  # characters, before a digest
_BARE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")
_PER_POINT = {"run.dir": "the sweep makes one for each point", "run.name": "a run's directory tells it from others"}
_EXAMPLE = "write KEY=A,B,C, such as optimizer.args.lr=1e-2,1e-3"


class Point(NamedTuple):
    """One run of a sweep."""

    overrides: tuple[str, ...]  # KEY=VALUE, in the order of the sweeps
    dir: str


def points(sweeps: Sequence[str], base_dir: str) -> list[Point]:
    """Every combination of the values of some `KEY=A,B,C`, in order, the last key varying fastest.

    A, B and C are YAML, so that KEY=[64],[64,64] has two values. The directory of a point is base_dir/lr=0.1,hidden=64,
    the same in every sweep of the same keys; a digest stands for what a path, URL or shell would not take. Raises
    JobError that says what was given and what is allowed.
    """
    swept = [_swept(text) for text in sweeps]
    keys = [key for key, _ in swept]
    _refuse(keys)
    total = math.prod(len(values) for _, values in swept)
    if total > MAX_POINTS:
        sizes = " x ".join(str(len(values)) for _, values in swept)
        raise JobError(
            f"--sweep: {sizes} = {total} points; at most {MAX_POINTS}: sweep fewer values, or in several goes"
        )
    combinations = list(itertools.product(*(values for _, values in swept)))
    changes = [tuple(f"{key}={_yaml(one)}" for key, one in zip(keys, values, strict=True)) for values in combinations]
    names = [",".join(map("{}={}".format, _short(keys), map(_plain, values))) for values in combinations]
    alike = {name for name, times in Counter(names).items() if times > 1}
    found = []
    for name, overrides in zip(names, changes, strict=True):
        safe = _safe(name)
        if safe != name or name in alike:
            safe += "-" + hashlib.sha256("\n".join(overrides).encode(errors="surrogatepass")).hexdigest()[:8]
        found.append(Point(overrides, f"{base_dir.rstrip('/')}/{safe}" if overrides else base_dir))
    return found


def _swept(text: str) -> tuple[str, list[Any]]:
    """(key, values) of one KEY=A,B,C."""
    key, equals, listed = text.partition("=")
    if not equals or not all(key.split(".")):
        raise JobError(f"--sweep {text!r} has no KEY=; {_EXAMPLE}")
    if key in _PER_POINT or key == "run":
        why = _PER_POINT.get(key, "it has run.dir in it")
        raise JobError(f"--sweep {text!r}: {key} cannot be swept, for {why}; run.seed can")
    try:
        document = parse(f"[{listed}\n]")  # on a line of its own: no comment hides the bracket
    except ValueError as error:
        raise JobError(f"--sweep {text!r}: {error}; put values that have , [ {{ or : in them in quotes") from None
    if document.problems:
        raise JobError(f"--sweep {text!r}: {document.problems[0].message}")
    values: list[Any] = document.value
    if not values:
        raise JobError(f"--sweep {text!r} has no values; {_EXAMPLE}")
    for number, value in enumerate(values):
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values[:number]):
            raise JobError(
                f"--sweep {text!r} has {_yaml(value)} twice; each point is run once, other seeds are run.seed=0,1"
            )
    return key, values


def _refuse(keys: Sequence[str]) -> None:
    for number, key in enumerate(keys):
        for earlier in keys[:number]:
            if earlier == key:
                raise JobError(f"--sweep has {key} twice; give all its values in one: {key}=A,B,C")
            if earlier.startswith(key + "."):
                raise JobError(f"--sweep {key} would undo {earlier}, which lies in it; put {key} first")


def _short(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or as many as tell it from the others."""
    paths = [key.split(".") for key in keys]
    longest = max(map(len, paths), default=0)
    return [
        next(
            (".".join(path[-n:]) for n in range(1, longest) if [other[-n:] for other in paths].count(path[-n:]) == 1),
            ".".join(path),
        )
        for path in paths
    ]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9=.,_+-]", "_", name)[:MAX_NAME]


def _plain(value: Any) -> str:
    """A value as it stands in a name: without quotes and brackets."""
    if isinstance(value, dict):
        return ",".join(f"{key}={_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    return value if isinstance(value, str) else _yaml(value)


def _yaml(value: Any) -> str:
    """Flow YAML that `parse` reads back to the same value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and scalar(value) is value else quoted(value)
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # YAML's .inf is a word to `parse`
    return json.dumps(value)
