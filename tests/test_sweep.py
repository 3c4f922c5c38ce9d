"""`--sweep KEY=A,B,C`: which runs it makes, what each is called, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DIGITS
from toolkit.cluster.sweep import Point, _yaml, points
from toolkit.config import load_job
from toolkit.config.text import parse
from toolkit.errors import JobError


def names(*sweeps: str) -> list[str]:
    return [point.dir.removeprefix("runs/x/") for point in points(sweeps, "runs/x")]


def test_it_is_the_product_in_order() -> None:
    assert points(["optimizer.args.lr=0.1,1e-2", "model.args.hidden=[64],[64,64]"], "s3://b/x/") == [
        Point(("optimizer.args.lr=0.1", "model.args.hidden=[64]"), "s3://b/x/lr=0.1,hidden=64"),
        Point(("optimizer.args.lr=0.1", "model.args.hidden=[64, 64]"), "s3://b/x/lr=0.1,hidden=64,64"),
        Point(("optimizer.args.lr=0.01", "model.args.hidden=[64]"), "s3://b/x/lr=0.01,hidden=64"),
        Point(("optimizer.args.lr=0.01", "model.args.hidden=[64, 64]"), "s3://b/x/lr=0.01,hidden=64,64"),
    ]


@pytest.mark.parametrize(
    ("listed", "values"),
    [
        ("1", [1]),
        ("[64],[64,64]", [[64], [64, 64]]),
        ("'a,b',c", ["a,b", "c"]),
        ("{name: cnn, args: {width: 8}},mlp", [{"name": "cnn", "args": {"width": 8}}, "mlp"]),
        ("null,true,on,010,1e999,~x", [None, True, "on", "010", float("inf"), "~x"]),
        ("'${env:A}',b", ["${env:A}", "b"]),
        ("a, b ,", ["a", "b"]),
        ("a,b # c", ["a", "b"]),
    ],
)
def test_values_are_split_as_yaml_and_come_back_as_they_were(listed: str, values: list[Any]) -> None:
    given = [point.overrides[0].partition("=")[2] for point in points([f"k={listed}"], "x")]
    assert [parse(text).value for text in given] == values


TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@given(VALUES)
@settings(max_examples=400, deadline=None)
def test_any_value_survives_the_way_to_the_job(value: Any) -> None:
    (point,) = points([f"k={_yaml(value)}"], "x")
    (override,) = point.overrides
    document = parse(override.partition("=")[2])
    assert document.problems == []
    assert repr(document.value) == repr(value)
    assert re.fullmatch(r"x/[A-Za-z0-9=.,_+-]{1,89}", point.dir)


def test_load_job_takes_the_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(DIGITS)
    found = points(["model.args.hidden=[8],[8,16]", "run.seed=1,2", "optimizer={name: sgd, args: {lr: 1e-1}}"], "r")
    jobs = [load_job(str(path), [*point.overrides, f"run.dir={point.dir}"]) for point in found]
    assert [(job.model.args["hidden"], job.run.seed, job.optimizer.args["lr"]) for job in jobs] == [
        ([8], 1, 0.1), ([8], 2, 0.1), ([8, 16], 1, 0.1), ([8, 16], 2, 0.1),
    ]  # fmt: skip
    assert [job.run.dir for job in jobs] == [point.dir for point in found]


def test_keys_that_end_alike_are_told_apart() -> None:
    assert names("optimizer.args.lr=1", "model.args.lr=2", "train.epochs=3") == [
        "optimizer.args.lr=1,model.args.lr=2,epochs=3"
    ]
    assert names("a.b.lr=1", "a.c.lr=2") == ["b.lr=1,c.lr=2"]
    assert names("lr=1", "a.lr=2") == ["lr=1,a.lr=2"]


def test_a_name_is_safe_short_and_of_one_point_only() -> None:
    hostile = ["'../x'", "'a b'", "a_b", "'$(rm)'", "'ü'", "'ö'", "64", "'64'", "[64]", "a" * 200, "a" * 201]
    found = names("k=" + ",".join(hostile))
    assert len(set(found)) == len(hostile)
    assert all(re.fullmatch(r"[A-Za-z0-9=.,_+-]{1,80}(-[0-9a-f]{8})?", name) and "/" not in name for name in found)
    assert "k=a_b" in {name[:5] for name in found}


def test_a_point_keeps_its_directory_when_values_are_added() -> None:
    before = names("lr=1,2", "name='a b',c_d")
    assert set(before) < set(names("lr=1,2,3", "name='a b',a_b,'c/d',c_d"))


def test_without_a_sweep_there_is_the_job_itself() -> None:
    assert points([], "runs/x") == [Point((), "runs/x")]


def test_a_thousand_points_and_no_more() -> None:
    ten = ",".join(map(str, range(10)))
    assert len(points([f"a={ten}", f"b={ten}", f"c={ten}"], "x")) == 1000
    with pytest.raises(JobError, match=r"10 x 10 x 10 x 2 = 2000 points; at most 1000"):
        points([f"a={ten}", f"b={ten}", f"c={ten}", "d=1,2"], "x")


@pytest.mark.parametrize(
    ("sweeps", "told"),
    [
        (["lr"], r"'lr' has no KEY=; write KEY=A,B,C"),
        (["=1,2"], r"has no KEY="),
        (["a..b=1"], r"has no KEY="),
        (["lr="], r"'lr=' has no values; write KEY=A,B,C"),
        (["lr=1,,2"], r"line 1, column 4.* in quotes"),
        (["lr=[1"], r"in quotes"),
        (["lr=1], [2"], r"in quotes"),
        (["lr=1] #"], r"in quotes"),
        (["lr=*a"], r"aliases are not allowed"),
        (["lr={a: 1, a: 2}"], r"twice"),
        (["lr=0.1,1e-1"], r"has 0\.1 twice; .*run\.seed=0,1"),
        (["lr=1,1.0"], r"has 1\.0 twice"),
        (["lr=1", "lr=2"], r"lr twice; .* lr=A,B,C"),
        (["model.args.width=1,2", "model=cnn,mlp"], r"model would undo model\.args\.width.* put model first"),
        (["run.dir=a,b"], r"run\.dir cannot be swept.* run\.seed can"),
        (["run.name=a,b"], r"run\.name cannot be swept"),
        (["run={seed: 1},{seed: 2}"], r"run cannot be swept"),
    ],
)
def test_what_is_no_sweep_is_refused_in_words(sweeps: list[str], told: str) -> None:
    with pytest.raises(JobError, match=told) as refused:
        points(sweeps, "x")
    assert str(refused.value).startswith("--sweep")
