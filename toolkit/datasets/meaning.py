"""Whether the numbers of two sets mean the same: else a model that has learnt from one is measured by nonsense on the
other, and nothing fails.
"""

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
        if name in known and own != known[name]:
            remedy = REMEDIES.get(component.name, "make them the same")
            raise JobError(
                f"{key} {component.name!r} is not like data.train: {_told(name, own, known[name])}; {remedy}"
            )


def of(dataset: Any) -> dict[str, Any]:
    """Which of MEANINGS a dataset has, as ints and lists."""
    found = {name: _plain(getattr(dataset, name, None)) for name in MEANINGS}
    return {name: value for name, value in found.items() if isinstance(value, int | list)}


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy, torch or pandas
    return list(value) if isinstance(value, str | tuple) else value


def _told(name: str, own: Any, known: Any) -> str:
    """The first of what differs, on both sides."""
    if isinstance(own, int) or isinstance(known, int):
        return f"its {name} is {own!r}, not {known!r}"
    differ = (at for at, (one, other) in enumerate(zip(own, known, strict=False)) if one != other)
    first = next(differ, min(len(own), len(known)))
    few = slice(first, first + 3)
    return f"its {name} from {first} on are {own[few]!r}, and there {known[few]!r}"
