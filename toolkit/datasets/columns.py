"""Columns of a CSV or Parquet file as arrays. The only user of pyarrow."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit import storage
from toolkit.errors import JobError

Kind = Literal["number", "category"]
LARGEST_BLOCK = 1 << 30
LARGEST = float(np.finfo(np.float32).max)  # and its square is still a float64


class Column(NamedTuple):
    """Numbers as float64, nan where one is missing; or, with `categories`, their places in these, -1 where missing."""

    name: str
    values: NDArray[Any]
    categories: tuple[Any, ...] | None = None

    @property
    def kind(self) -> Kind:
        return "number" if self.categories is None else "category"

    @property
    def missing(self) -> NDArray[np.bool_]:
        return np.isnan(self.values) if self.categories is None else self.values < 0

    def only(self, rows: NDArray[np.bool_]) -> "Column":
        """The column of these rows, none of them missing, with no category that none of them has."""
        if self.categories is None:
            return self._replace(values=self.values[rows])
        used, places = np.unique(self.values[rows], return_inverse=True)
        return Column(self.name, places, tuple(self.categories[place] for place in used))


class File:
    """A table that lies at a URL, read whole. Raises JobError for what is none."""

    def __init__(self, url: str, types: Mapping[str, Kind]) -> None:
        self.shown, self.types = storage.shown(url), types
        try:
            content = storage.read(url)
        except OSError as error:
            raise JobError(f"table {self.shown} cannot be read: {error}") from error
        self.typed = content.startswith(b"PAR1")  # a CSV's types are guesses
        arrow = _arrow()
        try:
            self.table = _from_parquet(content) if self.typed else _from_csv(content, types)
        except (arrow.ArrowException, OSError, ValueError) as error:
            what = "Parquet" if self.typed else "CSV"
            raise JobError(f"{self.shown} cannot be read as {what}: {error}; mend it, or set types") from error
        self.names = self.table.column_names
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise JobError(f"{self.shown} has more than one column {twice[0]!r}; rename one")
        if not self.table.num_rows:
            raise JobError(f"{self.shown} has no rows; give a file that has some")

    def columns(self, names: Sequence[str]) -> list[Column]:
        """The columns of these names. Raises JobError that lists all that are missing."""
        problems = [self._unknown(name) for name in dict.fromkeys([*names, *self.types]) if name not in self.names]
        if problems:
            raise JobError("\n".join(problems))
        return [self._column(name) for name in names]

    def _unknown(self, name: str) -> str:
        near = get_close_matches(name, self.names, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        return f"{self.shown} has no column {name!r}; {meant}It has: {', '.join(self.names)}"

    def _column(self, name: str) -> Column:
        arrow = _arrow()
        column = self.table.column(name).combine_chunks()
        kind = self.types.get(name) or _kind(column.type)
        if kind is None:
            raise JobError(
                f"column {name!r} of {self.shown} is of type {column.type}; numbers, booleans and UTF-8 text can be "
                "used: convert it, or leave it out of features"
            )
        try:
            column = column.cast(arrow.float64() if kind == "number" else arrow.string())
        except (arrow.ArrowException, ValueError) as error:
            raise JobError(f"column {name!r} of {self.shown} is no {kind}: {error}; mend it, or set types") from error
        if kind == "number":
            return Column(name, self._finite(name, column.to_numpy(zero_copy_only=False)))
        encoded = column.dictionary_encode()
        found: list[str] = encoded.dictionary.to_pylist()
        if not self.typed and name not in self.types:
            self._refuse_typo(name, found)
        categories = tuple(sorted(found))
        places = {value: place for place, value in enumerate(categories)}
        place_of = np.array([places[value] for value in found] + [-1])
        codes = encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)
        return Column(name, place_of[codes], categories)

    def _finite(self, name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if count := (np.abs(values) > LARGEST).sum():
            raise JobError(
                f"column {name!r} of {self.shown} has {count} infinite values, or beyond {LARGEST:.2g}, the largest "
                "float32; mend or remove these rows"
            )
        return values

    def _refuse_typo(self, name: str, values: Sequence[str]) -> None:
        """One word among numbers would make a column of numbers one of categories, with nobody told."""
        words = [value for value in values if not _is_number(value)]
        if 0 < len(words) < len(values):
            raise JobError(
                f"column {name!r} of {self.shown} holds numbers, but also {words[0]!r}; mend it, or say "
                f"types: {{{name}: category}}"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(type_: Any) -> Kind | None:
    types = _arrow().types
    if types.is_dictionary(type_):
        type_ = type_.value_type
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "category"
    numbers = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
    return "number" if any(is_one(type_) for is_one in numbers) else None


def _from_parquet(content: bytes) -> Any:
    from pyarrow import BufferReader, parquet

    return parquet.read_table(BufferReader(content), use_threads=False)  # workers are forked from this process


def _from_csv(content: bytes, types: Mapping[str, Kind]) -> Any:
    from pyarrow import BufferReader, csv, string

    return csv.read_csv(
        BufferReader(content),
        # In one block, or types would be those of the first megabyte.
        read_options=csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, LARGEST_BLOCK)),
        convert_options=csv.ConvertOptions(
            column_types={name: string() for name, kind in types.items() if kind == "category"},
            strings_can_be_null=True,
        ),
    )


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise JobError(f"table needs pyarrow ({error}); pip install 'toolkit[tables]'") from error
    pyarrow.enable_signal_handlers(False)  # what SIGINT and SIGTERM mean, the run says
    return pyarrow
