"""What a job file may say, what its traps become, and what an error tells."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import cli
from toolkit.config import Job, job_from_text, load_job
from toolkit.config.text import MAX_CHARACTERS, MAX_DEPTH, dump, parse
from toolkit.errors import JobError

JOBS = sorted((Path(__file__).parent.parent / "jobs").rglob("*.yaml"))

SMALL = """\
task: classification
data:
  train: digits
  global_batch_size: 32
model: mlp
optimizer: {name: adamw, args: {lr: 1e-3}}
train: {max_steps: 3}
"""


def load(text: str = SMALL, *overrides: str, **environment: str) -> Job:
    return job_from_text(text, "jobs/small.yaml", overrides, environment)


def refused(text: str = SMALL, *overrides: str, **environment: str) -> str:
    with pytest.raises(JobError) as error:
        load(text, *overrides, **environment)
    return str(error.value)


def at(job: Job, key: str) -> Any:
    node: Any = job
    for name in key.split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    return node


# -- scalars: the schema's type, whatever YAML 1.1 makes of them


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("optimizer.args.lr", "1e-3", 1e-3),
        ("optimizer.args.lr", ".5", 0.5),
        ("checkpoint.every_min", "2", 2.0),
        ("checkpoint.every_min", "~", None),
        ("train.ema_decay", "999e-3", 0.999),
        ("train.freeze", "['layers.0.*', on]", ("layers.0.*", "on")),
        ("optimizer.lr_scale", "{head.*: 1e1, blocks.0.*: 5e-2}", {"head.*": 10.0, "blocks.0.*": 0.05}),
        ("eval.precision", "bf16", "bf16"),
        ("train.compile", "True", True),
        ("run.name", "on", "on"),
        ("run.name", "yes", "yes"),
        ("run.name", "010", "010"),
        ("run.name", '"10"', "10"),
        ("run.dir", "2:30", "2:30"),
        ("model.args.x", "1_000", "1_000"),
        ("model.args.x", "0x10", "0x10"),
        ("model.args.x", "2024-01-01", "2024-01-01"),
        ("model.args.x", "9" * 200, "9" * 200),
    ],
)
def test_a_scalar_means_what_it_looks_like(key: str, written: str, meant: Any) -> None:
    found = at(load(SMALL, f"{key}={written}"), key)
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize("word", ["on", "yes", "off", "no", "y", "1", '"true"'])
def test_only_true_and_false_are_booleans(word: str) -> None:
    message = refused(SMALL, f"train.compile={word}")
    assert word.strip('"') in message
    assert "train.compile" in message
    assert "it must be a valid boolean" in message


@pytest.mark.parametrize("text", ["2:30", "010", "1_000", "0x10", "1e3", "3.5", '"3"', "true", "three"])
def test_a_number_is_never_guessed(text: str) -> None:
    message = refused(SMALL, f"train.epochs={text}")
    assert "train.epochs: " in message
    assert "it must be a valid integer (passes over the training set)" in message


# -- texts that are no job file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c", ["line 1, column 5", "mapping values are not allowed"]),
        ("a: 1\nb: [1, 2\n", ["line 3, column 1", "expected ',' or ']'"]),
        ("a:\n\t- b", ["line 2, column 1", "\\t"]),
        ("a: \x07", ["character 3", "special characters"]),
        (SMALL + "---\na: 1\n", ["more than one YAML document"]),
        ("[a]: 1", ["line 1", "a key must be a plain word"]),
        ("- a\n- b", ["not a mapping", "data:"]),
        ("digits", ["not a mapping"]),
        ("", ["not a mapping"]),
        ("a: " + "[" * (MAX_DEPTH + 1), ["line 1", f"deeper than {MAX_DEPTH} levels"]),
        ("[" * 400_000, [f"deeper than {MAX_DEPTH} levels"]),
        ("#" * (MAX_CHARACTERS + 1), [f"{MAX_CHARACTERS + 1} characters long", f"at most {MAX_CHARACTERS}"]),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, str) else "",
)
def test_a_text_that_is_no_job_is_refused_with_its_place(text: str, words: list[str]) -> None:
    message = refused(text)
    assert message.startswith("job file jobs/small.yaml")
    for word in words:
        assert word in message


BOMB = "a: &a [x, x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model: !!python/object/apply:os.system [echo]\n",
            ["line 8: model: ", "python/object/apply:os.system", "tags"],
        ),
        ("log: !!map {every_steps: 2}\n", ["line 8: log: ", "tags are not allowed"]),
        ("log: &here {every_steps: 2}\n", ["line 8: log: &here: anchors are not allowed"]),
        ("log: {<<: *base}\n", ["line 8: log.<<: *base: aliases are not allowed"]),
        (BOMB, ["*h: aliases are not allowed; write the value out"]),
        ("model: cnn\n", ["line 8: model: is given twice, first in line 5; keep one"]),
        ("log:\n  every_steps: 1\n  every_steps: 2\n", ["line 10: log.every_steps: is given twice, first in line 9"]),
    ],
)
@pytest.mark.timeout(10)
def test_what_yaml_does_behind_the_back_is_refused_with_its_line(text: str, words: list[str]) -> None:
    message = refused(SMALL + text)
    for word in words:
        assert word in message


def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run: {name: café}".encode("latin-1"))
    with pytest.raises(JobError, match=r"latin\.yaml is not UTF-8 text \(byte 15\); save it as UTF-8"):
        load_job(str(tmp_path / "latin.yaml"))


# -- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.args.lr=3e-4", "optimizer.args.lr", 3e-4),
        ("model.args.hidden=[8, 4]", "model.args.hidden", [8, 4]),
        ("model.name=cnn", "model.name", "cnn"),
        ("model=cnn", "model.name", "cnn"),
        ("data.val={fraction: 0.2}", "data.val.fraction", 0.2),
        ("data.val.fraction=0.2", "data.val.fraction", 0.2),
        ("run.dir=s3://bucket/a=b", "run.dir", "s3://bucket/a=b"),
        ("train.clip_grad_norm=", "train.clip_grad_norm", None),
    ],
)
def test_an_override_sets_one_dotted_key(override: str, key: str, value: Any) -> None:
    assert at(load(SMALL, override), key) == value


def test_an_override_into_the_short_form_keeps_the_name() -> None:
    model = load(SMALL, "model.args.hidden=[8]", "model.args.dropout=0.5").model
    assert (model.name, model.args) == ("mlp", {"hidden": [8], "dropout": 0.5})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", ["'train.epochs' is not an override", "KEY=VALUE"]),
        ("=3", ["'=3' is not an override"]),
        ("train..epochs=3", ["'train..epochs=3' is not an override"]),
        ("train.epochs=[", ["train.epochs: '['", "line 1, column 2"]),
        ("log={every_steps: 1, every_steps: 2}", ["log.every_steps: is given twice"]),
        ("train.epoch=3", ["train.epoch: is an unknown key; did you mean 'epochs'?"]),
        ("lr=3", ["lr: is an unknown key here; did you mean optimizer.args.lr?"]),
        ("model.hidden=[3]", ["model.hidden: is an unknown key; arguments go under model.args.hidden"]),
    ],
)
def test_a_wrong_override_is_named_as_such(override: str, words: list[str]) -> None:
    message = refused(SMALL, override)
    assert "command line: " in message
    for word in words:
        assert word in message


# -- references


@pytest.mark.parametrize(
    ("override", "environment", "key", "value"),
    [
        ("run={seed: 3, dir: 'to/${run.name}-${run.seed}'}", {}, "run.dir", "to/small-3"),
        ("train.max_steps=${env:X}", {"X": "7"}, "train.max_steps", 7),
        ("train.compile=${env:X}", {"X": "true"}, "train.compile", True),
        ("run.name=${env:X}", {"X": "12345"}, "run.name", "12345"),
        ("run.name=${env:X}", {"X": "1e3"}, "run.dir", "runs/1e3"),
        ("run.dir=a${env:X}b", {"X": ""}, "run.dir", "ab"),
        ("run.dir=a-${env:X}", {"X": "${run.name}"}, "run.dir", "a-${run.name}"),
    ],
)
def test_a_reference_is_replaced_and_typed_as_the_schema_says(
    override: str, environment: dict[str, str], key: str, value: Any
) -> None:
    assert at(load(SMALL, override, **environment), key) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.name=${env:NOT_SET}", ["run.name: '${env:NOT_SET}'", "the environment has no NOT_SET; set it"]),
        ("run.name=${run.name}", ["run.name: ", "${run.name} refers to itself"]),
        ("run={name: '${run.dir}', dir: '${run.name}'}", ["${run.dir} refers to itself"]),
        ("run.name=${run.nme}", ["${run.nme} names no value of this file", "${env:NAME}"]),
        ("run.name=${data}", ["${data} names no value of this file"]),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_once(override: str, words: list[str]) -> None:
    message = refused(SMALL, override)
    for word in words:
        assert word in message
    assert "None is not allowed" not in message  # no second problem that only follows from the first


@pytest.mark.timeout(10)
def test_references_cannot_grow_without_bound() -> None:
    keys = "".join(f'    k{n}: "${{model.args.k{n + 1}}}${{model.args.k{n + 1}}}"\n' for n in range(40))
    text = SMALL.replace("model: mlp\n", f"model:\n  name: mlp\n  args:\n{keys}    k40: x\n")
    assert "more than 1000 references" in refused(text)


# -- secrets


def test_a_secret_is_in_the_job_but_not_in_what_is_stored() -> None:
    overrides = ["run.name=${env:S}", "run.dir=runs/${run.name}", "model.args={token: '${env:S}', all: ['${env:S}']}"]
    job = load(SMALL, *overrides, S="hunter2")
    assert (job.run.dir, job.model.args["token"]) == ("runs/hunter2", "hunter2")
    stored = dump(job.as_written())
    assert "hunter2" not in stored
    again = job_from_text(stored, "config.yaml", [], {"S": "other"})
    assert (again.run.name, again.run.dir, again.model.args["all"]) == ("other", "runs/other", ["other"])


@pytest.mark.parametrize(
    ("override", "key"),
    [("run.init_from=s3://k:${env:S}@bucket/run", "run.init_from"), ("train.freeze=['${env:S}*']", "train.freeze")],
)
def test_a_secret_in_any_key_is_stored_as_it_was_written(override: str, key: str) -> None:
    job = load(SMALL, override, S="hunter2")
    assert "hunter2" in str(at(job, key))
    stored = dump(job.as_written())
    assert "hunter2" not in stored
    assert at(job_from_text(stored, "config.yaml", [], {"S": "hunter2"}), key) == at(job, key)


def test_a_run_that_is_moved_keeps_the_secret_of_its_url() -> None:
    for written in ("${env:S}", "s3://k:${env:S}@bucket/run/"):
        job = load(SMALL, f"run.dir={written}", S="hunter2")
        override = job.moved_to(job.run.dir.rstrip("/") + "-2")
        assert "hunter2" not in override
        assert load(SMALL, override, S="hunter2").run.dir == job.run.dir.rstrip("/") + "-2"
    with pytest.raises(JobError, match=r"run\.dir '\$\{env:S\}' stands for what ends in /"):
        load(SMALL, "run.dir=${env:S}", S="hunter2/").moved_to("hunter2-2")
    assert load(SMALL, load(SMALL, "run.dir='a: #'").moved_to("a: #-2")).run.dir == "a: #-2"


def test_a_fresh_start_stores_its_directory_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "hunter2").mkdir()
    monkeypatch.setenv("S", f"{tmp_path}/hunter2")
    started: list[Job] = []
    monkeypatch.setattr(cli, "_train_as_rank", lambda job: started.append(job) or 0)
    with pytest.raises(typer.Exit):
        cli.train(str(tmp_path / "small.yaml"), ["run.dir=${env:S}"], processes=1, fresh=True)
    assert started[0].run.dir == f"{tmp_path}/hunter2-2"
    assert started[0].as_written()["run"]["dir"] == "${env:S}-2"


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=${env:S}",
        "run.name=a b ${env:S}",
        "run.dir=['${env:S}']",
        "train.epochs={a: ['${env:S}']}",
        "model={name: mlp, args: ['${env:S}']}",
        "data.val.fraction=${env:S}",
    ],
)
def test_an_error_shows_a_secret_as_it_was_written(override: str) -> None:
    message = refused(SMALL, override, S="hunter2")
    assert "hunter2" not in message
    assert "${env:S}" in message


# -- the function


def test_it_reads_the_environment_and_takes_one_override_without_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.setenv("WHERE", "runs/there")
    assert load_job(str(tmp_path / "small.yaml"), "run.dir=${env:WHERE}").run.dir == "runs/there"


# -- problems


@pytest.mark.parametrize(
    "override",
    ["train.freeze=[*.bias]", "train.freeze=[*bias]", "train.freeze=*", "optimizer.lr_scale={*.bias: 3}",
     "optimizer.lr_scale={*bias: 3}"],
)  # fmt: skip
def test_a_pattern_that_yaml_takes_for_an_alias_is_told_how_to_be_written(override: str) -> None:
    assert "a pattern that begins with * needs quotes: ['*.bias']" in refused(SMALL, override)


def test_all_problems_are_reported_together() -> None:
    text = SMALL.replace("global_batch_size: 32", "global_batch_size: many\n  wrkers: 3") + "log: {every_steps: 0}\n"
    lines = refused(text, "train.precision=fp8", "eval={every_epochs: 1, every_steps: 2}").splitlines()
    assert lines[0] == "job file jobs/small.yaml has 5 problems:"
    for words in [
        ("line 4: data.global_batch_size: 'many'", "a valid integer", "samples a step"),
        ("line 5: data.wrkers: is an unknown key", "did you mean 'workers'?", "Allowed: global_batch_size, "),
        ("line 9: log.every_steps: 0 is not allowed", "greater than or equal to 1"),
        ("command line: train.precision: 'fp8'", "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("command line: eval: give every_epochs or every_steps, not both",),
    ]:
        assert any(all(word in line for word in words) for line in lines), words


@pytest.mark.parametrize("key", ["int", "float", "component", "fraction", "a[0]", "data.fraction", "data.val.int"])
def test_an_unknown_key_is_named_whatever_it_is_called(key: str) -> None:
    assert f"command line: {key}: is an unknown key" in refused(SMALL, f"{key}=1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.ema_decay=1", "train.ema_decay: 1 is not allowed; it must be less than 1"),
        ("train.ema_decay=0", "train.ema_decay: 0 is not allowed; it must be greater than 0"),
        ("train.freeze=layers.0.*", "train.freeze: 'layers.0.*' is not allowed; it must be a valid tuple"),
        ("eval.precision=fp8", "eval.precision: 'fp8' is not allowed; it must be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("run.init_from=''", "run.init_from: '' is not allowed"),
        ("run.init_except=[head.*]", "run: init_except leaves something out of init_from, and there is no init_from"),
        ("optimizer.lr_scale={head.*: 0}", "optimizer.lr_scale.head.*: 0 is not allowed; it must be greater than 0"),
        ("optimizer.lr_scale=10", "optimizer.lr_scale: 10 is not allowed; it must be a valid dictionary"),
        ("optimizer.lr_scales={}", "optimizer.lr_scales: is an unknown key; did you mean 'lr_scale'?"),
        ("optimizer.lr=1e-3", "optimizer.lr: is an unknown key; arguments go under optimizer.args.lr"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every: 0 is not allowed; it must be greater than or equal to 1"),
        ("checkpoint.on_error=retry", "it must be 'continue' or 'stop'"),
        ("log.samples=1", "log.samples: 1 is not allowed; it must be a valid boolean"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_the_bound(override: str, words: str) -> None:
    assert words in refused(SMALL, override)


def test_a_job_without_an_end_is_refused() -> None:
    assert "train: give epochs or max_steps" in refused(SMALL, "train={device: cpu}")


# -- dump and schema

TRICKY = ["on", "1e-3", "010", "null", "~", "", "1_000", "2:30", "- a", "a: b", "# x", "${env:X}", "a\nb", "\x85", "é"]
TEXTS = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
LEAVES = TEXTS | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
TREES = st.recursive(
    LEAVES | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(TREES)
def test_what_is_dumped_is_read_back_the_same(tree: Any) -> None:
    document = parse(dump(tree))
    assert repr(document.value) == repr(tree)  # repr tells 1 from 1.0 and from True
    assert not document.problems


def test_a_list_that_appears_twice_is_written_twice() -> None:
    twice = [1, 2]
    assert parse(dump({"a": twice, "b": twice})).value == {"a": [1, 2], "b": [1, 2]}


def test_every_field_has_a_description() -> None:
    schema = Job.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) > 8
    bare = [name for part in sections for name, field in part["properties"].items() if not field.get("description")]
    assert not bare


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_of_ours_is_short_and_loads(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    job = load_job(str(path))
    assert job.run.dir == f"runs/{path.stem}"
    assert math.isfinite(job.optimizer.args["lr"])


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_json_schema_knows_every_key_of_our_jobs(path: Path) -> None:
    schema = Job.model_json_schema()
    sections = {"Job": schema, **schema["$defs"]}
    tree = parse(path.read_text()).value
    assert tree.keys() <= schema["properties"].keys()
    for key in tree.keys() & {"run", "data", "train", "eval", "checkpoint", "log", "launch"}:
        assert tree[key].keys() <= sections[key.capitalize()]["properties"].keys()
    assert all(section["additionalProperties"] is False for section in sections.values())
