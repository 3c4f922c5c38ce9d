"""The directory of a run: its job, where it comes from, and what is told of it."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from toolkit import lock, storage
from toolkit.config import Job
from toolkit.drift import MAY_CHANGE, changed, digest
from toolkit.errors import JobError, RunError
from toolkit.provenance import source_code
from toolkit.run import SAVE_NOW, STOP, Run, fresh_url

JOB = {
    "run": {"name": "x", "dir": "runs/x", "seed": 0, "init_from": None},
    "model": {"name": "cnn", "args": {"width": 32}},
    "train": {"epochs": 5, "max_steps": None, "clip_grad_norm": None, "precision": "auto", "ema_decay": None},
    "data": {"workers": 2, "global_batch_size": 32},
    "eval": {"every_epochs": 1},
}
MACHINE = {
    "host": "node-1", "pid": os.getpid(), "pid_namespace": "pid:[1]", "boot_id": "boot-1", "slurm_job_id": None,
    "slurm_restart_count": 0, "gpus": [],
}  # fmt: skip
RESOLVED = {"train.precision": "fp32"}


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a run may lie: on disk, and where nothing can be appended."""
    place = str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path.name}"
    yield place
    storage.remove(place)


Opens = Callable[..., Run]


@pytest.fixture
def opened() -> Iterator[Opens]:
    """Opens a run, until the end of the test."""
    with ExitStack() as stack:

        def opened(
            url: str, *words: str, job: dict[str, Any] = JOB, resolved: Any = RESOLVED, data: Any = None, **machine: Any
        ) -> Run:
            run = Run(url)
            run.open("text: of the job\n", job, resolved, words, MACHINE | machine, data=data)
            stack.callback(run.close)
            return run

        yield opened


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that come five times a second."""
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "REMOTE_BEAT_S", 0.2)


def beats(run: Run, count: int = 2) -> None:
    """Wait until the run's lock has beaten so often from now on; the first may have begun before."""
    beaten, before = threading.Semaphore(0), run.lock.on_beat

    def on_beat() -> None:
        before()
        beaten.release()

    run.lock.on_beat = on_beat
    for _ in range(count):
        assert beaten.acquire(timeout=30)
    run.lock.on_beat = before


def contents(url: str, *names: str) -> list[bytes]:
    return [storage.read(storage.join(url, name)) for name in names]


def test_a_new_directory_knows_nothing(url: str) -> None:
    run = Run(url)
    assert (run.status(), run.provenance(), run.metrics.read(), run.completed(JOB)) == (None, {}, [], None)
    assert not run.wished(SAVE_NOW)


def test_the_job_is_found_again_from_the_url_alone(url: str, opened: Opens) -> None:
    opened(url)
    provenance = Run(url).provenance()
    assert (provenance["job"], provenance["resolved"]) == (JOB, RESOLVED)
    assert storage.read(Run(url).at("config.yaml")) == b"text: of the job\n"


def test_every_start_is_one_more_attempt_and_none_is_forgotten(url: str, opened: Opens) -> None:
    opened(url, "first").close()
    opened(url, "second").set_status("running")
    attempts = Run(url).provenance()["attempts"]
    assert [(attempt["attempt"], attempt["command"]) for attempt in attempts] == [(1, ["first"]), (2, ["second"])]
    assert all(attempt["host"] == "node-1" and "torch" in attempt["packages"] for attempt in attempts)
    assert all(attempt["packages"]["python"] and attempt["packages"]["toolkit"] for attempt in attempts)
    assert Run(url).status()["attempt"] == 2


def test_an_attempt_is_never_called_like_an_earlier_one_though_the_claims_are_gone(url: str, opened: Opens) -> None:
    opened(url).close()
    opened(url).close()
    storage.remove(Run(url).at("lock"))
    assert [attempt["attempt"] for attempt in opened(url).provenance()["attempts"]] == [1, 2, 3]


def test_a_second_writer_is_refused_and_writes_nothing(url: str, opened: Opens) -> None:
    opened(url, "first")
    names = ["config.yaml", "provenance.json", "lock/attempt-0001.json"]
    before = contents(url, *names)
    with pytest.raises(JobError, match=r"held by attempt 1 on host node-1"):
        opened(url, "second")
    assert contents(url, *names) == before
    assert storage.names(Run(url).at("lock")) == ["attempt-0001.json"]


def test_a_run_that_is_closed_can_be_opened_by_the_next(url: str, opened: Opens) -> None:
    opened(url).close()
    opened(url, host="node-2", boot_id="boot-2")


def test_a_run_that_cannot_be_written_is_refused_and_let_go_of(
    url: str, opened: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write

    def full(place: str, *args: Any, **options: Any) -> None:
        if place.endswith("provenance.json"):
            raise OSError(28, "No space left on device")
        write(place, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        with pytest.raises(JobError, match="cannot be written: .*No space left on device; choose another run.dir"):
            opened(url)
    opened(url, host="node-2", boot_id="boot-2")  # at once


def test_who_waited_for_the_lock_still_refuses_the_job_of_another(
    url: str, opened: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = lock.Lock.claim

    def waited(self: Any, *args: Any) -> int:
        monkeypatch.setattr(lock.Lock, "claim", claim)
        opened(url, "other").close()  # one that was quicker, and is done by now
        return claim(self, *args)

    monkeypatch.setattr(lock.Lock, "claim", waited)
    with pytest.raises(JobError, match="another job"):
        opened(url, "mine", job=JOB | {"model": {"name": "mlp", "args": {}}})
    assert [attempt["command"] for attempt in Run(url).provenance()["attempts"]] == [["other"]]
    opened(url, "third", host="node-2", boot_id="boot-2")  # the lock was let go of


def test_status_keeps_what_is_not_named_and_has_a_heartbeat(url: str, opened: Opens) -> None:
    run = opened(url)
    run.set_status("running", step=3, total=9)
    run.set_status("preempted", step=5)
    status = Run(url).status()
    assert (status["state"], status["step"], status["total"]) == ("preempted", 5, 9)
    assert status["heartbeat"].endswith("Z")


def test_progress_is_written_with_the_next_heartbeat_and_an_end_is_not_unsaid(
    url: str, opened: Opens, quick: None
) -> None:
    run = opened(url)
    run.set_status("running", step=1)
    run.progress(step=2)
    assert Run(url).status()["step"] == 1
    beats(run)
    assert Run(url).status()["step"] == 2
    run.set_status("completed", step=3)
    run.progress(step=4)
    beats(run)
    assert [Run(url).status()[key] for key in ("state", "step")] == ["completed", 3]


def test_wishes_are_seen_with_the_next_heartbeat_and_taken_away_when_granted(
    url: str, opened: Opens, quick: None
) -> None:
    run = opened(url)
    Run(url).ask(SAVE_NOW)
    assert not run.wished("anything else")
    beats(run)
    assert run.wished(SAVE_NOW)
    run.granted(SAVE_NOW)
    assert not run.wished(SAVE_NOW)
    assert storage.names(run.at("requests")) == []


def test_a_remote_copy_of_the_metrics_follows_without_a_save(
    tmp_path: Path, opened: Opens, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.journal.Journal.UPLOAD_S", 0.0)
    run = opened(f"memory://{tmp_path.name}")
    run.metrics.open(0)
    run.metrics.append({"step": 1})
    beats(run)
    assert Run(run.url).metrics.read() == [{"step": 1}]


def test_what_cannot_be_written_beside_the_loop_is_a_problem_that_passes(
    url: str, opened: Opens, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write, away = opened(url), storage.write, "status.json"
    run.set_status("running")

    def broken(place: str, *args: Any, **options: Any) -> None:
        if place.endswith(away):
            raise OSError(f"no way to write {away}")
        write(place, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", broken)
        beats(run)
        assert run.problem == "no way to write status.json"
        away = "attempt-0001.json"  # the lock's own
        waited = threading.Event()
        while run.problem != f"no way to write {away}":
            assert not waited.wait(0.02)
    beats(run)
    assert run.problem is None


def test_who_was_taken_over_tells_nothing_any_more(tmp_path: Path, opened: Opens) -> None:
    url = f"memory://{tmp_path.name}"
    old = opened(url)
    old.metrics.open(0)
    old.metrics.append({"step": 1, "attempt": 1})
    old.set_status("running", step=1)
    claim = old.at("lock", "attempt-0001.json")
    storage.write(claim, json.dumps(json.loads(storage.read(claim)) | {"released": True}).encode())
    new = opened(url)
    new.metrics.open(0)
    new.metrics.append({"step": 1, "attempt": 2})
    new.metrics.upload()
    new.set_status("running", step=2)
    with pytest.raises(RunError, match="has taken over"):
        old.lock.check()
    old.set_status("failed", step=9)
    old.close()
    assert [Run(url).status()[key] for key in ("attempt", "state", "step")] == [2, "running", 2]
    assert [line["attempt"] for line in Run(url).metrics.read()] == [2]


def test_a_run_whose_rank_is_gone_can_be_marked_as_failed(url: str, opened: Opens) -> None:
    opened(url).set_status("running", step=3)
    Run(url).mark("failed", reason="rank 1 was killed", exit=1)
    status = Run(url).status()
    assert [status[key] for key in ("state", "step", "reason", "exit")] == ["failed", 3, "rank 1 was killed", 1]


def test_a_run_is_complete_only_for_the_job_and_the_end_that_it_has_reached(url: str, opened: Opens) -> None:
    run = opened(url)
    assert run.completed(JOB) is None
    run.set_status("completed", summary="done")
    assert run.completed(JOB)["summary"] == "done"
    assert run.completed(JOB | {"eval": {"every_epochs": 7}})
    for key, value in {"epochs": 6, "max_steps": 9}.items():
        assert run.completed(JOB | {"train": JOB["train"] | {key: value}}) is None
    assert run.completed(JOB | {"model": {"name": "mlp", "args": {}}}) is None
    run.set_status("preempted")
    assert run.completed(JOB) is None


def test_a_directory_of_another_job_is_refused_with_each_difference_and_the_remedies(url: str, opened: Opens) -> None:
    opened(url).close()
    names = ["provenance.json", "config.yaml", "lock/attempt-0001.json"]
    before = contents(url, *names)
    wide = JOB | {"model": {"name": "cnn", "args": {"width": 64}}, "run": JOB["run"] | {"seed": 1}}
    with pytest.raises(JobError) as refusal:
        opened(url, job=wide)
    where, said = storage.shown(url), str(refusal.value)
    assert said.startswith(f"{where} holds a run of another job:\n  model.args.width: 32 -> 64\n  run.seed: 0 -> 1\n")
    for remedy in (f"toolkit fork {where} --at STEP", f"run.init_from={where}", "--fresh", "put the old values back"):
        assert remedy in said
    assert contents(url, *names) == before


def test_auto_that_means_something_else_here_is_a_difference(url: str, opened: Opens) -> None:
    opened(url).close()
    with pytest.raises(JobError, match=r"train.precision: 'fp32' -> 'bf16' \(what auto means on this machine\)"):
        opened(url, resolved={"train.precision": "bf16"})
    opened(url, resolved=RESOLVED)


def test_other_data_are_a_difference_and_a_run_that_knows_nothing_of_its_data_goes_on(url: str, opened: Opens) -> None:
    opened(url).close()
    opened(url, data={"samples": 3, "classes": ["cat", "dog"]}).close()
    for now, line in (
        ({"samples": 2}, "samples: 3 -> 2"),
        ({"classes": ["cat"]}, r"classes: .'cat', 'dog'. -> .'cat'."),
    ):
        with pytest.raises(JobError, match=rf"other data .*:\n  {line}\nput the data back .* toolkit fork .*--fresh"):
            opened(url, data=now)
    opened(url, data={"samples": 3, "vocab_size": 5})


@pytest.mark.parametrize(
    ("name", "content"),
    [("status.json", b"{"), ("status.json", b"[1]"), ("provenance.json", b"\xff\xfe"), ("provenance.json", b"")],
)
def test_a_damaged_file_is_named(url: str, name: str, content: bytes) -> None:
    storage.write(Run(url).at(name), content)
    with pytest.raises(JobError, match=rf"{name} is damaged"):
        Run(url).status() if name == "status.json" else Run(url).provenance()


def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, words in (("file", "Not a directory"), ("file/x", "Not a directory"), ("x" * 300, "File name too long")):
        with pytest.raises(JobError, match=words):
            Run(str(tmp_path / place)).status()


CHANGES = [
    ("model", "args", {"width": 64}, "model.args.width: 32 -> 64"),
    ("model", "args", {"width": 32, "norm": False}, "model.args.norm: None -> False"),
    ("model", "args", {}, "model.args.width: 32 -> None"),
    ("run", "seed", 1, "run.seed: 0 -> 1"),
    ("run", "init_from", "runs/y", "run.init_from: None -> 'runs/y'"),
    ("data", "global_batch_size", 64, "data.global_batch_size: 32 -> 64"),
    ("train", "clip_grad_norm", 1.0, "train.clip_grad_norm: None -> 1.0"),
    ("train", "ema_decay", 0.9, "train.ema_decay: None -> 0.9"),
    ("train", "precision", "bf16", "train.precision: 'auto' -> 'bf16'"),
]


@pytest.mark.parametrize(("section", "key", "value", "line"), CHANGES)
def test_what_makes_another_run_is_listed(section: str, key: str, value: Any, line: str) -> None:
    new = JOB | {section: JOB[section] | {key: value}}
    assert changed(JOB, new) == [line]
    assert digest(JOB, RESOLVED) != digest(new, RESOLVED)


@pytest.mark.parametrize("key", sorted(MAY_CHANGE))
def test_what_may_differ_between_two_starts_is_no_change(key: str) -> None:
    section, _, name = key.partition(".")
    new = JOB | {section: JOB.get(section, {}) | {name: "new"} if name else {"anything": "new"}}
    assert new != JOB
    assert changed(JOB, new) == []
    assert digest(JOB, RESOLVED) == digest(new, RESOLVED)


@pytest.mark.parametrize("nothing", [None, False, {}, []])
def test_a_run_that_is_older_than_a_key_goes_on_where_the_key_says_nothing(nothing: Any) -> None:
    new = JOB | {"train": JOB["train"] | {"key_of_tomorrow": nothing}}
    assert changed(JOB, new) == []
    assert digest(JOB, RESOLVED) == digest(new, RESOLVED)
    assert changed(JOB, JOB | {"train": JOB["train"] | {"key_of_tomorrow": 0}}) == ["train.key_of_tomorrow: None -> 0"]


def test_what_may_change_is_a_part_of_the_job_file() -> None:
    fields = Job.model_fields
    for key in MAY_CHANGE:
        section, _, name = key.partition(".")
        assert section in fields
        assert not name or name in fields[section].annotation.model_fields


def test_a_digest_is_that_of_the_job_and_of_what_auto_means_in_any_order() -> None:
    assert digest(dict(reversed(JOB.items())), RESOLVED) == digest(JOB, RESOLVED)
    assert digest(JOB, {"train.precision": "bf16"}) != digest(JOB, RESOLVED)


def test_a_run_begins_from_another_with_its_metrics_up_to_there(url: str, opened: Opens) -> None:
    old = opened(url + "/old")
    old.metrics.open(0)
    for step in (1, 2, 3):
        old.metrics.append({"step": step})
    old.close()
    new = Run(url + "/new")
    new.begin_from(old, 2, "text: of another job\n", JOB | {"run": {"name": "y"}})
    assert new.metrics.read() == [{"step": 1}, {"step": 2}]
    assert storage.read(new.at("config.yaml")) == b"text: of another job\n"
    provenance = new.provenance()
    assert provenance["forked_from"] == {"run": storage.shown(old.url), "step": 2}
    assert (provenance["resolved"], provenance["attempts"]) == (RESOLVED, [])
    opened(new.url, job=JOB | {"run": {"name": "y"}})
    assert new.provenance()["forked_from"]["step"] == 2


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
    tmp_path: Path, opened: Opens, word: str, kept: str
) -> None:
    opened(str(tmp_path / "run"), "train", "job.yaml", word)
    text = (tmp_path / "run" / "provenance.json").read_text()
    assert "hunter2" not in text
    assert json.loads(text)["attempts"][0]["command"] == ["train", "job.yaml", kept]


def test_the_commit_and_what_was_not_committed_are_stored(tmp_path: Path, opened: Opens) -> None:
    (tmp_path / "code.py").write_text("before = 1\n")
    as_someone = ["git", "-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*as_someone, *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "code.py").write_text("after = 2\n")
    opened(str(tmp_path / "run"), **source_code(str(tmp_path)))
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


@pytest.mark.parametrize(("state", "kept"), [("running", True), ("failed", True), ("preempted", False)])
def test_a_stop_request_outlives_a_failure_but_no_end(url: str, opened: Opens, state: str, kept: bool) -> None:
    opened(url).set_status(state, step=3)
    Run(url).ask(STOP)
    claim = Run(url).at("lock", "attempt-0001.json")
    storage.write(claim, json.dumps(json.loads(storage.read(claim)) | {"released": True}).encode())
    opened(url)
    assert storage.exists(Run(url).at("requests", STOP)) == kept
