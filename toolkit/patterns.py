"""Patterns of names, such as `blocks.0.*`, as the job file has them for the model's weights."""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from toolkit.errors import JobError


def matched(key: str, pattern: str, names: Iterable[str], what: str) -> list[str]:
    """The names that match a pattern, upper and lower case apart.

    Raises JobError if there are none, for the `key` of the job file, with the nearest; `what` says whose names these
    are.
    """
    names = list(names)
    if found := [name for name in names if fnmatchcase(name, pattern)]:
        return found
    parts = {".".join([*name.split(".")[:depth], "*"]) for name in names for depth in range(1, name.count(".") + 1)}
    near = get_close_matches(pattern, [*names, *sorted(parts)], 1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise JobError(f"{key}: {pattern!r} matches none of {what}; {meant}Their names: {', '.join(names[:5])}{more}")
