"""The directory of a run: its journal, its job, and what is told of it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit import storage
from toolkit.errors import JobError
from toolkit.run import MAY_CHANGE, Journal, Run, changed, fresh_url

JOB = {
    "run": {"name": "x", "dir": "runs/x", "seed": 0},
    "model": {"name": "cnn", "args": {"width": 32}},
    "train": {"epochs": 5, "clip_grad_norm": None},
    "data": {"workers": 2, "global_batch_size": 32},
    "eval": {"every_epochs": 1},
}


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a run may lie: on disk, and where nothing can be appended."""
    place = str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path.name}"
    yield place
    storage.remove(place)


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def written(url: str, last_step: int, *steps: int, attempt: int = 1) -> Journal:
    """A journal opened after `last_step`, with a line for each of some steps, closed."""
    journal = Journal(url)
    journal.open(last_step)
    for step in steps:
        journal.append({"step": step, "attempt": attempt})
    journal.close()
    return journal


def steps_of(journal: Journal) -> list[int]:
    return [line["step"] for line in journal.read()]


def opened(url: str, *words: str, job: dict[str, Any] = JOB) -> Run:
    run = Run(url)
    run.open("text: of the job\n", job, words, {"host": "node-1"})
    return run


def test_a_journal_gives_back_its_lines(url: str) -> None:
    journal = Journal(storage.join(url, "metrics.jsonl"))
    assert journal.read() == []
    journal.open(0)
    lines = [{"step": 1, "train/loss": 0.1 + 0.2}, {"step": 2, "note": "größer\u2028 \n"}]
    for line in lines:
        journal.append(line)
    journal.close()
    assert journal.read() == lines


@pytest.mark.parametrize("last_step", [0, 3, 5, 9])
def test_a_resumed_journal_has_one_line_a_step_and_the_newest(url: str, last_step: int) -> None:
    written(url + "/m", 0, 1, 2, 3, 4, 5)
    resumed = written(url + "/m", last_step, *range(last_step + 1, 7), attempt=2)
    kept = min(last_step, 5)
    assert [(line["step"], line["attempt"]) for line in resumed.read()] == [
        *((step, 1) for step in range(1, kept + 1)),
        *((step, 2) for step in range(last_step + 1, 7)),
    ]


@pytest.mark.parametrize("torn", ['{"ste', '{"step": 3}', "{"])
def test_a_last_line_that_a_kill_cut_short_is_ignored_and_then_gone(url: str, torn: str) -> None:
    journal = written(url + "/m", 0, 1, 2)
    storage.write(url + "/m", storage.read(url + "/m") + torn.encode())
    assert steps_of(journal) == [1, 2]
    assert steps_of(written(url + "/m", 5, 6)) == [1, 2, 6]


def test_a_local_journal_has_every_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "m"))
    journal.open(0)
    for step in (1, 2):
        journal.append({"step": step})
        assert steps_of(Journal(str(tmp_path / "m"))) == list(range(1, step + 1))
    journal.close()


def test_a_remote_journal_spools_until_it_is_closed_and_leaves_no_spool(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "UPLOAD_S", float("inf"))
    remote = f"memory://{tmp_path.name}/m"
    written(remote, 0, 1)
    journal = Journal(remote)
    journal.open(1)
    journal.append({"step": 2})
    assert steps_of(Journal(remote)) == [1]
    assert len(list(spool.iterdir())) == 1
    journal.close()
    assert steps_of(Journal(remote)) == [1, 2]
    assert list(spool.iterdir()) == []
    storage.remove(remote)


def test_a_remote_journal_is_brought_up_to_date_when_its_time_is_up_or_when_asked(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, now_s = f"memory://{tmp_path.name}/m", [1000.0]
    monkeypatch.setattr("toolkit.run.time.monotonic", lambda: now_s[0])
    journal, seen = Journal(remote), []
    journal.open(0)
    for step, wait_s in enumerate([0, 1, 28, 2, 1], 1):
        now_s[0] += wait_s
        journal.append({"step": step})
        seen.append(steps_of(Journal(remote))[-1])
    assert seen == [1, 1, 1, 4, 4]
    journal.upload()
    assert steps_of(Journal(remote)) == [1, 2, 3, 4, 5]
    journal.close()
    storage.remove(remote)


def test_a_new_directory_knows_nothing(url: str) -> None:
    assert (Run(url).status(), Run(url).written_job(), Run(url).metrics.read()) == (None, None, [])


def test_the_job_is_found_again_from_the_url_alone(url: str) -> None:
    opened(url)
    assert Run(url).written_job() == JOB
    assert storage.read(Run(url).at("config.yaml")) == b"text: of the job\n"


def test_every_start_is_one_more_attempt_and_none_is_forgotten(url: str) -> None:
    opened(url, "first")
    opened(url, "second").set_status("running")
    attempts = json.loads(storage.read(Run(url).at("provenance.json")))["attempts"]
    assert [attempt["command"] for attempt in attempts] == [["first"], ["second"]]
    assert all(attempt["host"] == "node-1" and "torch" in attempt["packages"] for attempt in attempts)
    assert Run(url).status()["attempt"] == 2


def test_status_keeps_what_is_not_named_and_has_a_heartbeat(url: str) -> None:
    run = opened(url)
    run.set_status("running", step=3, total=9)
    run.set_status("preempted", step=5)
    status = Run(url).status()
    assert (status["state"], status["step"], status["total"]) == ("preempted", 5, 9)
    assert status["heartbeat"].endswith("Z")


def test_a_run_whose_rank_is_gone_can_be_marked_as_failed(url: str) -> None:
    opened(url).set_status("running", step=3)
    Run(url).failed("rank 1 was killed")
    status = Run(url).status()
    assert [status[key] for key in ("state", "step", "reason", "exit")] == ["failed", 3, "rank 1 was killed", 1]


def test_a_directory_of_another_job_is_refused_with_each_difference(url: str) -> None:
    opened(url)
    before = storage.read(Run(url).at("provenance.json"))
    with pytest.raises(JobError, match=r"another job:\n  model.args.width: 32 -> 64\n") as refusal:
        opened(url, job=JOB | {"model": {"name": "cnn", "args": {"width": 64}}})
    assert "--fresh" in str(refusal.value)
    assert storage.read(Run(url).at("provenance.json")) == before


@pytest.mark.parametrize(
    ("name", "content"), [("status.json", b"{"), ("provenance.json", b"\xff\xfe"), ("provenance.json", b"")]
)
def test_a_damaged_file_is_named(url: str, name: str, content: bytes) -> None:
    storage.write(Run(url).at(name), content)
    with pytest.raises(JobError, match=rf"{name} is damaged"):
        Run(url).status() if name == "status.json" else Run(url).written_job()


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("model", "args", {"width": 64}, "model.args.width: 32 -> 64"),
        ("model", "args", {"width": 32, "norm": False}, "model.args.norm: None -> False"),
        ("model", "args", {}, "model.args.width: 32 -> None"),
        ("run", "seed", 1, "run.seed: 0 -> 1"),
        ("data", "global_batch_size", 64, "data.global_batch_size: 32 -> 64"),
        ("train", "clip_grad_norm", 1.0, "train.clip_grad_norm: None -> 1.0"),
    ],
)
def test_what_makes_another_run_is_listed(section: str, key: str, value: Any, line: str) -> None:
    assert changed(JOB, JOB | {section: JOB[section] | {key: value}}) == [line]


@pytest.mark.parametrize("key", sorted(MAY_CHANGE))
def test_what_may_differ_between_two_starts_is_no_change(key: str) -> None:
    section, _, name = key.partition(".")
    new = JOB | {section: JOB.get(section, {}) | {name: "new"} if name else {"anything": "new"}}
    assert new != JOB
    assert changed(JOB, new) == []


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("run.dir=s3://user:hunter2@host/bucket", "run.dir=s3://…@host/bucket"),
        ("run.dir=sftp://user:hunter2@hunter2@host/x", "run.dir=sftp://…@host/x"),
        ("data.train.args.api_key=hunter2", "data.train.args.api_key=…"),
        ("tracker.TOKEN=hunter2=hunter2", "tracker.TOKEN=…"),
        ("x.db_password=hunter2 hunter2", "x.db_password=…"),
        ("aws_secret_access=hunter2", "aws_secret_access=…"),
        ("x.credentials=hunter2", "x.credentials=…"),
        ("data.train.args.root=https://h/d?v=1&token=hunter2&w=2", "data.train.args.root=https://h/d?v=1&token=…&w=2"),
        ("https://host/data?X-Amz-Signature=hunter2", "https://host/data?X-Amz-Signature=…"),
        ("model.args.width=64", "model.args.width=64"),
        ("run.dir=s3://bucket/run@2", "run.dir=s3://bucket/run@2"),
    ],
)
def test_a_secret_on_the_command_line_is_not_stored_and_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)  # outside of any repository, whose diff is stored too
    opened(str(tmp_path / "run"), "train", "job.yaml", word)
    text = (tmp_path / "run" / "provenance.json").read_text()
    assert "hunter2" not in text
    assert json.loads(text)["attempts"][0]["command"] == ["train", "job.yaml", kept]


def test_the_commit_and_what_was_not_committed_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("before = 1\n")
    as_someone = ["git", "-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*as_someone, *words], check=True, capture_output=True)
    (tmp_path / "code.py").write_text("after = 2\n")
    opened(str(tmp_path / "run"))
    (attempt,) = json.loads((tmp_path / "run" / "provenance.json").read_text())["attempts"]
    assert len(attempt["git_commit"]) == 40
    assert "-before = 1\n+after = 2" in attempt["git_diff"]


def test_fresh_url_is_the_first_that_is_free(url: str) -> None:
    free = []
    for _ in range(3):
        free.append(fresh_url(url + "/"))
        storage.write(storage.join(free[-1], "config.yaml"), b"")
    assert free == [url, f"{url}-2", f"{url}-3"]
    for taken in free:
        storage.remove(taken)
