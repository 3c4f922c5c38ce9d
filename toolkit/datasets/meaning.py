"""Whether the numbers of two sets mean the same: else a model that has learnt from one is measured by nonsense on the
other, and nothing fails.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from toolkit.errors import JobError

# What tells, of a dataset that has it, what its numbers mean: an int, a text or a sequence.
MEANINGS = ("classes", "alphabet", "columns", "scales", "num_classes", "vocab_size")
REMEDIES = {
    "digits": "give both the same digits",
    "image_folder": "put both folders under one root, and name them as split",
    "table": "take both from one file with split, or train on a file with split: all and give its path here as like",
    "text": "take both from one file with split, or set unit: bytes",
    "tokens": "give both files of one vocabulary",
}


def check(key: str, component: Any, dataset: Any, train: Any) -> None:
    """Raises JobError where the dataset that `key` of the job file names has another meaning than that of training."""
    known = of(train)
    for name, own in of(dataset).items():
        if name in known and _differ(own, known[name], is_ours=":" not in component.name):
            remedy = REMEDIES.get(component.name, "make them the same")
            raise JobError(
                f"{key} {component.name!r} is not like data.train: {_told(name, own, known[name])}; {remedy}"
            )


def of(dataset: Any) -> dict[str, Any]:
    """Which of MEANINGS a dataset has."""
    return plain({name: getattr(dataset, name, None) for name in MEANINGS})


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of it is an int, a text or a sequence, as JSON gives it back; all else says nothing of data."""
    listed = {name: _listed(value) for name, value in found.items()}
    return {name: value for name, value in listed.items() if not isinstance(value, float) and _lasts(value)}


def _listed(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy, torch or pandas
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value


def _lasts(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_lasts, value))
    return isinstance(value, int | str) or (isinstance(value, float) and isfinite(value))


def _differ(own: Any, known: Any, is_ours: bool) -> bool:
    """Whether one says another thing than the other. A dataset of the user's own may see fewer classes or tokens in one
    part of its data, and may call in words what another calls by numbers.
    """
    if is_ours or own == known:
        return bool(own != known)
    if isinstance(own, int) and isinstance(known, int):
        return own > known
    return _kinds(own) == _kinds(known)


def _kinds(value: Any) -> set[type]:
    return {type(one) for one in value} if isinstance(value, list) else {type(value)}


def _told(name: str, own: Any, known: Any) -> str:
    """The first of what differs, on both sides."""
    if not isinstance(own, str | list) or not isinstance(known, str | list):
        return f"its {name} is {own!r}, not {known!r}"
    differ = (at for at, (one, other) in enumerate(zip(own, known, strict=False)) if one != other)
    first = next(differ, min(len(own), len(known)))
    few = slice(first, first + 3)
    return f"its {name} from {first} on are {own[few]!r}, and there {known[few]!r}"
