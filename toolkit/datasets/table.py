"""Rows of a CSV or Parquet file: some columns are the input, one is the target."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit import storage
from toolkit.datasets.columns import Column, File, Kind
from toolkit.datasets.memory import InMemory
from toolkit.datasets.stream import Int64s, order
from toolkit.errors import JobError

MOST_CATEGORIES = 1000


class Table(InMemory):
    """Inputs (F,) float32; targets int64 classes, or float32 for a regression.

    `path`: a file with a header, by path or URL. A column is of numbers or of categories, as the file has it or `types`
    says. Numbers become (value - mean) / standard deviation; a category becomes as many inputs as there are categories,
    in the order of their names, of which one is 1. Classes are the target's values, sorted. `columns` names the inputs.

    `train` is a share 1 - `test_fraction` of the rows, `test` the others, chosen by their number alone. Means and
    deviations are those of train (of all rows, for `all`), categories and classes those of the whole file; with `like`,
    all are those of the file there, for a test set that is a file of its own.

    `scales` has the mean and the deviation of each column that is standardised. Numbers that differ by no more than
    rounding become 0.

    Missing values are refused, with column and count; `drop` leaves out their rows.
    """

    def __init__(
        self,
        path: str,
        target: str,
        kind: Literal["classification", "regression"] = "classification",
        features: list[str] | None = None,
        types: dict[str, Kind] | None = None,
        split: Literal["train", "test", "all"] = "all",
        test_fraction: float = 0.2,
        missing: Literal["refuse", "drop"] = "refuse",
        like: str | None = None,
        standardise_target: bool = False,
    ) -> None:
        """`features`: default all columns but the target. `standardise_target`: a regression's, as numbers are."""
        if not 0 < test_fraction < 1:
            raise JobError(f"test_fraction {test_fraction} must be between 0 and 1")
        if standardise_target and kind == "classification":
            raise JobError(
                "standardise_target is for numbers, and classes are none; leave it out, or set kind: regression"
            )
        self.source = storage.shown(path)
        *of, of_target = _read(like or path, target, features, types or {}, missing)
        known: dict[str, Kind] = {column.name: column.kind for column in (*of, of_target)}
        *mine, my_target = _read(path, target, [*known][:-1], known, missing) if like else (*of, of_target)
        count = len(my_target.values)
        rows = _rows(count, split, test_fraction)
        fitted = slice(None) if like or split == "all" else _rows(count, "train", test_fraction)
        self.scales: list[tuple[str, float, float]] = []
        inputs = [self._input(own, other, fitted)[rows] for own, other in zip(mine, of, strict=True)]
        self.inputs = torch.from_numpy(np.concatenate(inputs, axis=1))
        self.columns = [name for column in of for name in _names(column)]
        self.input_shape = (len(self.columns),)
        if kind == "classification":
            self.targets = torch.from_numpy(self._classes(my_target, of_target)[rows])
        else:
            values = self._numbers(my_target, of_target, fitted if standardise_target else None)
            self.targets = torch.from_numpy(values[rows].astype(np.float32))

    def _input(self, column: Column, of: Column, fitted: Int64s | slice) -> NDArray[np.float32]:
        """The inputs (N, k) that a column becomes, by the numbers or categories of another."""
        if of.categories is None:
            return self._standardised(column, of.values[fitted]).astype(np.float32)[:, None]
        if len(of.categories) > MOST_CATEGORIES:
            raise JobError(
                f"column {of.name!r} of {self.source} has {len(of.categories)} different values, and at most "
                f"{MOST_CATEGORIES} can be categories; leave it out of features"
            )
        return np.eye(len(of.categories), dtype=np.float32)[self._as_in(column, of)]

    def _classes(self, column: Column, of: Column) -> Int64s:
        column, of = (self._labels(column), self._labels(of))
        self.classes = of.categories or ()
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise JobError(f"the target {of.name!r} of {self.source} has one value only; choose another")
        return self._as_in(column, of)

    def _labels(self, column: Column) -> Column:
        """The column with whole numbers as categories."""
        if column.categories is not None:
            return column
        values, places = np.unique(column.values, return_inverse=True)
        if (values % 1).any():
            raise JobError(
                f"the target {column.name!r} of {self.source} holds numbers such as {values[values % 1 != 0][0]}, "
                "which are no classes; set kind: regression"
            )
        return Column(column.name, places, tuple(values.astype(np.int64).tolist()))

    def _numbers(self, column: Column, of: Column, fitted: Int64s | slice | None) -> NDArray[np.float64]:
        if of.categories is not None:
            raise JobError(
                f"the target {of.name!r} of {self.source} is text such as {of.categories[0]!r}, and a regression needs "
                "numbers; set kind: classification"
            )
        self.num_classes = 1
        return column.values if fitted is None else self._standardised(column, of.values[fitted])

    def _standardised(self, column: Column, known: NDArray[np.float64]) -> NDArray[np.float64]:
        mean, deviation = _mean_and_deviation(known)
        self.scales.append((column.name, mean, deviation))
        return np.asarray((column.values - mean) / deviation)

    def _as_in(self, column: Column, of: Column) -> Int64s:
        """The places of a column's values in the categories of another."""
        places = {name: place for place, name in enumerate(of.categories or ())}
        place_of = np.array([places.get(name, -1) for name in column.categories or ()], np.int64)
        found: Int64s = place_of[column.values]
        if unseen := column.values[found < 0].tolist():
            example = (column.categories or ())[unseen[0]]
            raise JobError(
                f"column {column.name!r} of {self.source} has {example!r}, which the file of `like` lacks, and there "
                f"are {len(unseen)} such rows; remove them, or leave the column out of features"
            )
        return found


def _read(
    url: str, target: str, features: list[str] | None, types: dict[str, Kind], missing: Literal["refuse", "drop"]
) -> list[Column]:
    """The columns of the inputs, then that of the target, without missing values."""
    file = File(url, types)
    chosen = [name for name in file.names if name != target] if features is None else features
    if not chosen or target in chosen or len(set(chosen)) < len(chosen):
        raise JobError(f"features {chosen} of {file.shown} must be one or more columns, each once, without the target")
    columns = file.columns([*chosen, target])
    counts = {column.name: int(column.missing.sum()) for column in columns if column.missing.any()}
    rows = len(columns[0].values)
    told = ", ".join(f"{count} in column {name!r}" for name, count in counts.items())
    if counts and missing == "refuse":
        raise JobError(
            f"{file.shown} has missing values, of {rows} rows {told}; fill them in, leave the columns out of features, "
            "or leave the rows out with missing: drop"
        )
    whole = ~np.logical_or.reduce([column.missing for column in columns])
    if not whole.any():
        raise JobError(f"{file.shown}: each of its {rows} rows has a missing value: {told}; leave out columns")
    return [column.only(whole) for column in columns]


def _rows(count: int, split: Literal["train", "test", "all"], test_fraction: float) -> Int64s:
    """The numbers of a split's rows, in their order."""
    if split == "all":
        return np.arange(count)
    shuffled = order(count, 0, np.zeros(count, np.int64), np.arange(count))
    cut = round(count * test_fraction)
    rows = shuffled[:cut] if split == "test" else shuffled[cut:]
    if not rows.size:
        raise JobError(f"{split} has none of {count} rows with test_fraction {test_fraction}; choose another")
    return np.sort(rows)


def _mean_and_deviation(values: NDArray[np.float64]) -> tuple[float, float]:
    """Of values that differ by no more than rounding, one of them and 1: the sum of equal numbers is rounded, and what
    that loses would be taken for their deviation.
    """
    if np.ptp(values) <= 4 * np.spacing(np.abs(values).max()):
        return float(values[0]), 1.0
    return float(values.mean()), float(values.std() or np.ptp(values))  # squares may be too small for a number


def _names(column: Column) -> list[str]:
    """What the inputs of a column are called."""
    return [column.name] if column.categories is None else [f"{column.name}={value}" for value in column.categories]
