"""Tables: what a column becomes, that it becomes the same in every split, and that nothing is left unsaid."""

import io
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tests.campaigns import starts
from tests.conftest import ROOT, Workplace
from toolkit import storage
from toolkit.datasets.table import Table
from toolkit.errors import JobError

SMALL = "size,colour,sold,y\n1,red,true,b\n2,blue,false,a\n3,red,false,b\n6,green,true,c\n"


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    starts.warm()


def put_csv(folder: str, rows: int = 40) -> str:
    """A table of `rows` rows of which both columns tell the target."""
    url = storage.join(folder, "rows.csv")
    lines = [f"{'abc'[row % 3]},{row % 3 + row % 7 / 10},{'xyz'[row % 3]}" for row in range(rows)]
    storage.write(url, "\n".join(["letter,number,y", *lines]).encode())
    return url


def put(folder: Path, text: str | bytes, name: str = "t.csv") -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def parquet_of(**columns: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def test_numbers_are_standardised_and_categories_one_of_many_from_any_url(root: str) -> None:
    storage.write(storage.join(root, "t.csv"), SMALL.encode())
    table = Table(storage.join(root, "t.csv"), "y")
    assert table.columns == ["size", "colour=blue", "colour=green", "colour=red", "sold"]
    size, sold = np.array([1, 2, 3, 6]), np.array([1, 0, 0, 1])
    expected = np.stack([(size - 3) / size.std(), [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0], (sold - 0.5) / 0.5], axis=1)
    assert torch.equal(table.inputs, torch.from_numpy(expected.astype(np.float32)))
    assert (table.classes, table.targets.tolist()) == (("a", "b", "c"), [1, 0, 1, 2])
    assert (table.num_classes, table.input_shape, table.targets.dtype) == (3, (5,), torch.int64)


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    columns = {
        "size": pa.array([1, 2, 3, 6], pa.decimal128(5, 2)),
        "colour": pa.array(["red", "blue", "red", "green"]).dictionary_encode(),
        "sold": [True, False, False, True],
        "y": ["b", "a", "b", "c"],
    }
    one, other = Table(put(tmp_path, SMALL), "y"), Table(put(tmp_path, parquet_of(**columns), "t.parquet"), "y")
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.targets, other.targets)
    assert (one.columns, one.classes) == (other.columns, other.classes)


def test_the_order_of_rows_changes_no_encoding(tmp_path: Path) -> None:
    header, *rows = SMALL.splitlines()
    one = Table(put(tmp_path, SMALL), "y")
    other = Table(put(tmp_path, "\n".join([header, *rows[::-1]]), "other.csv"), "y")
    assert torch.equal(one.inputs, other.inputs.flip(0))
    assert torch.equal(one.targets, other.targets.flip(0))


@pytest.mark.parametrize("standardise", [False, True])
def test_a_regression_has_its_numbers_or_these_standardised_as_target(tmp_path: Path, standardise: bool) -> None:
    table = Table(put(tmp_path, SMALL), "size", "regression", ["colour"], standardise_target=standardise)
    size = np.array([1, 2, 3, 6])
    expected = (size - 3) / size.std() if standardise else size
    assert torch.equal(table.targets, torch.from_numpy(expected.astype(np.float32)))
    assert (table.num_classes, table.columns) == (1, ["colour=blue", "colour=green", "colour=red"])


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    table = Table(put(tmp_path, SMALL), "size", features=["colour"])
    assert (table.classes, table.targets.tolist()) == ((1, 2, 3, 6), [0, 1, 2, 3])


def test_train_and_test_are_all_rows_once_and_only_train_says_what_the_mean_is(tmp_path: Path) -> None:
    path = put(tmp_path, "x,y\n" + "\n".join(f"{row},{row % 2}" for row in range(100)))
    train, test, whole = (Table(path, "y", split=split, test_fraction=0.3) for split in ("train", "test", "all"))
    assert (len(train), len(test)) == (70, 30)
    mean, deviation = whole.inputs.mean(), whole.inputs.std(correction=0)
    assert torch.allclose(torch.stack([mean, deviation]), torch.tensor([0.0, 1.0]), atol=1e-6)
    assert train.inputs.mean().abs() < 1e-6 < test.inputs.mean().abs()
    both = torch.cat([train.inputs, test.inputs]).flatten().sort().values
    assert torch.allclose(both.diff(), both.diff()[0].expand(99), atol=1e-5)  # 0..99, each once


def test_a_split_has_every_category_whichever_rows_it_got(tmp_path: Path) -> None:
    path = put(tmp_path, "x,y\n" + "\n".join(f"k{row},{row % 2}" for row in range(10)))
    assert [Table(path, "y", split=split).input_shape for split in ("train", "test")] == [(10,), (10,)]


def test_a_test_set_that_is_a_file_of_its_own_is_encoded_like_the_training_set(tmp_path: Path) -> None:
    path = put(tmp_path, SMALL)
    test = Table(put(tmp_path, "y,sold,size,colour\nc,false,4,red\n", "test.csv"), "y", like=path)
    deviation = np.array([1, 2, 3, 6]).std()
    assert torch.allclose(test.inputs, torch.tensor([[1 / deviation, 0, 0, 1, -1]], dtype=torch.float32))
    assert (test.targets.tolist(), test.num_classes) == ([2], 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0.1"] * 1000, 0.1),
        (["0.3", "0.30000000000000004"] * 500, -0.1),
    ],
)
def test_numbers_that_differ_by_no_more_than_rounding_become_0(
    tmp_path: Path, values: list[str], expected: float
) -> None:
    path = put(tmp_path, "\n".join(["x,y", *(f"{value},{row % 2}" for row, value in enumerate(values))]))
    train = Table(path, "y")
    test = Table(put(tmp_path, "x,y\n0.2,0\n", "test.csv"), "y", like=path)
    assert train.inputs.abs().max() < 1e-15
    assert test.inputs.item() == pytest.approx(expected)


def test_numbers_whose_squares_are_too_small_for_a_number_are_told_apart(tmp_path: Path) -> None:
    assert Table(put(tmp_path, "x,y\n1e-200,0\n3e-200,1\n"), "y").inputs.tolist() == [[-0.5], [0.5]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1,pink,true,a", "column 'colour' of .*test.csv has 'pink', which the file of `like` lacks, and there are 1"),
        ("1,red,true,d", "column 'y' of .*test.csv has 'd', which the file of `like` lacks"),
    ],
)
def test_a_value_that_training_has_not_seen_is_named(tmp_path: Path, row: str, words: str) -> None:
    test = put(tmp_path, f"size,colour,sold,y\n{row}\n2,red,false,a\n", "test.csv")
    with pytest.raises(JobError, match=words):
        Table(test, "y", like=put(tmp_path, SMALL))


def test_types_make_categories_of_numbers_as_they_are_written(tmp_path: Path) -> None:
    table = Table(put(tmp_path, "zip,y\n02139,1\n10115,0\n02139,0\n"), "y", types={"zip": "category"})
    assert table.columns == ["zip=02139", "zip=10115"]


def test_rows_with_missing_values_are_left_out_when_so_wished(tmp_path: Path) -> None:
    gaps = SMALL + ",pink,true,d\n5,,true,b\n5,red,NA,b\n5,red,true,\n"
    whole, dropped = Table(put(tmp_path, SMALL), "y"), Table(put(tmp_path, gaps, "gaps.csv"), "y", missing="drop")
    assert torch.equal(whole.inputs, dropped.inputs)
    assert torch.equal(whole.targets, dropped.targets)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, "t.csv cannot be read: .*No such file"),
        ("", {}, "cannot be read as CSV: Empty CSV file; mend it, or set types"),
        ("size,y\n", {}, "has no rows"),
        ("a,b,y\n1,2,x\n1,x\n", {}, "cannot be read as CSV: .*Expected 3 columns, got 2"),
        ("a,a,y\n1,2,x\n", {}, "has more than one column 'a'; rename one"),
        (parquet_of(a=[1, 2], y=[0, 1])[:-9], {}, "cannot be read as Parquet: "),
        (SMALL, {"target": "price"}, "has no column 'price'; It has: size, colour, sold, y"),
        (SMALL, {"features": ["siez"]}, "has no column 'siez'; did you mean 'size'?"),
        (SMALL, {"types": {"color": "category"}}, "has no column 'color'; did you mean 'colour'?"),
        (SMALL, {"features": []}, r"features \[\] .* must be one or more columns, each once, without the target"),
        (SMALL, {"features": ["y"]}, r"features \['y'\] .* without the target"),
        (SMALL, {"types": {"colour": "number"}}, "column 'colour' .* is no number: .*'green'.*set types"),
        (SMALL, {"target": "colour", "kind": "regression"}, "'colour' .* is text such as 'blue', .*kind: class"),
        (SMALL, {"test_fraction": 1.0}, "test_fraction 1.0 must be between 0 and 1"),
        (SMALL, {"split": "test", "test_fraction": 0.1}, "test has none of 4 rows with test_fraction 0.1"),
        ("a,b,y\n1,,0\n,,1\n3,4,\n", {}, "of 3 rows 1 in column 'a', 2 in column 'b', 1 in column 'y'; fill them"),
        ("a,y\n,0\n,1\n", {"missing": "drop"}, "each of its 2 rows has a missing value: 2 in column 'a'"),
        ("a,y\n1,0\ninf,1\n", {}, "column 'a' .* has 1 infinite values"),
        ("a,y\n1,0\n-1e39,1\n", {}, "column 'a' .* has 1 .* beyond 3.4e.38, the largest float32"),
        (SMALL, {"standardise_target": True}, "standardise_target is for numbers, .*set kind: regression"),
        ("a,y\n1,0\n2,1\n3o,1\n", {}, "column 'a' .* holds numbers, but also '3o'; mend it, or say types: {a: cat"),
        ("a,y\n1,0.5\n2,1\n", {}, "target 'y' .* holds numbers such as 0.5, which are no classes; set kind: regress"),
        ("a,y\n1,x\n2,x\n", {}, "target 'y' .* has one value only"),
        ("a,y\n2020-01-01,0\n2020-01-02,1\n", {}, "column 'a' .* is of type date32"),
        (b"a,y\n\xff,0\nb,1\n", {}, "column 'a' .* is of type binary; numbers, booleans and UTF-8 text can"),
        (parquet_of(a=[date(2020, 1, 1)], y=[1]), {"types": {"a": "number"}}, "column 'a' .* is no number: "),
        (
            "a,y\n" + "\n".join(f"k{row},{row % 2}" for row in range(1001)),
            {},
            "1001 different values, and at most 1000",
        ),
    ],
)
def test_what_cannot_be_a_table_is_named(
    tmp_path: Path, content: str | bytes | None, options: dict[str, Any], words: str
) -> None:
    path = str(tmp_path / "t.csv") if content is None else put(tmp_path, content)
    with pytest.raises(JobError, match=words):
        Table(path, **{"target": "y", **options})


def test_a_table_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(JobError, match=r"table needs pyarrow .*pip install 'toolkit\[tables\]'"):
        Table(put(tmp_path, SMALL), "y")


def test_wrong_tables_are_refused_by_the_command_with_nothing_written(workplace: Workplace) -> None:
    mine, job = starts.Forked(workplace.folder), str(ROOT / "jobs/table_mlp.yaml")
    assert "2 in column 'bill_length_mm'" in mine.refused("train", job, "data.train.args.missing=refuse")
    assert "has no column 'weight'" in mine.refused("train", job, "data.train.args.target=weight")
    assert "'tagret'; did you mean 'target'?" in mine.refused("train", job, "data.train.args.tagret=sex")


def test_a_regression_on_a_table_learns_what_the_mean_does_not_tell(workplace: Workplace) -> None:
    mine = starts.Forked(workplace.folder)
    args = (
        "{path: jobs/data/penguins.csv, target: body_mass_g, kind: regression, missing: drop, standardise_target: true}"
    )
    data = [f"data.train={{name: table, args: {args}}}", "data.test=null"]
    mine.run(
        "train",
        "jobs/table_mlp.yaml",
        *data,
        "task=regression",
        "checkpoint.best=null",
        "train.epochs=10",
        "run.dir=run",
    )
    assert mine.metrics("run")[-1]["val/loss"] < 0.4  # always to say the mean would be 1
