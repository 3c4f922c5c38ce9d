"""Datasets by name. Each is a map-style `torch.utils.data.Dataset`; an own one is named `package.module:Class`.

`ds[i]` gives `(input, target)`. A dataset that has `gather(indices)` gives a whole batch at once, which is many times
faster than sample by sample. `num_classes`, `input_shape` and `vocab_size` are offered to the model; `source` names the
files in errors; what `meaning.MEANINGS` names must be the same for training and evaluation. A class that takes files
from the network lists them in `downloads(**args)`.
"""

from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset

from toolkit import components
from toolkit.datasets import meaning
from toolkit.datasets.download import Download
from toolkit.errors import JobError

DATASETS = {
    "cifar10": "toolkit.datasets.cifar:Cifar10",
    "digits": "toolkit.datasets.digits:Digits",
    "fashion_mnist": "toolkit.datasets.idx:FashionMnist",
    "image_folder": "toolkit.datasets.images:ImageFolder",
    "mnist": "toolkit.datasets.idx:Mnist",
    "synthetic": "toolkit.datasets.synthetic:Synthetic",
    "table": "toolkit.datasets.table:Table",
    "text": "toolkit.datasets.text:Text",
    "tokens": "toolkit.datasets.tokens:Tokens",
}

SHAPES = ("num_classes", "input_shape", "vocab_size")
NAMES = ("classes", "alphabet")


def build(key: str, component: Any, train: Any = None) -> Any:
    """The dataset that `key` of the job file names.

    Raises JobError for one that is no map, is empty, or whose numbers mean something else than those of `train`.
    """
    dataset = components.build(key, component, DATASETS)
    if isinstance(dataset, IterableDataset):
        raise JobError(
            f"{key} {component.name!r} is an IterableDataset: its samples have no index, so a "
            "run could neither share them exactly "
            "over ranks nor resume without repeating some; give it __len__ and __getitem__"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise JobError(
            f"{key} {component.name!r} is a {type(dataset).__name__} without __len__ or __getitem__; add them"
        )
    if len(dataset) == 0:
        raise JobError(f"{key} {component.name!r} is empty; it needs at least one sample")
    meaning.check(key, component, dataset, train)
    return dataset


def downloads(key: str, component: Any) -> list[Download]:
    """The files that the dataset would take from the network. Raises JobError for one that is not known."""
    constructor = components.find(key, component.name, DATASETS)
    listed: Callable[..., list[Download]] | None = getattr(constructor, "downloads", None)
    return listed(**components.checked_args(key, component, constructor)) if listed else []


def shapes(dataset: Any) -> dict[str, Any]:
    """What the dataset knows of its shapes, to be offered to the model."""
    return {name: getattr(dataset, name) for name in SHAPES if hasattr(dataset, name)}


def facts(dataset: Any, samples: int) -> dict[str, Any]:
    """By what a set of so many training samples is known again, as JSON gives it back: with another number of them the
    stream is another, and with other classes the targets are.
    """
    named = {name: getattr(dataset, name, None) for name in NAMES}
    return meaning.plain({"samples": samples} | shapes(dataset) | named)
