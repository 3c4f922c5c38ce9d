"""`toolkit status`, `logs` and `cancel` tell what a run is doing, whoever runs it, and end it with nothing lost."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Workplace
from toolkit.cluster import logs
from toolkit.cluster.cancel import cancel
from toolkit.cluster.monitor import Known, judged, view, views
from toolkit.cluster.queue import Entry
from toolkit.errors import JobError, RunError
from toolkit.run import Run

NOW = 1_800_000_000.0
LONG = ("train.max_steps=1000000", "log.every_steps=1000", "checkpoint.every_steps=100000")


def at(age_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW - age_s))


def known(state: str | None, beat_age_s: float = 1, submitted_age_s: float | None = 100, **status: Any) -> Known:
    """A run in this state, with a heartbeat and a submission so long ago."""
    submitted: dict[str, Any] = {}
    if submitted_age_s is not None:
        submitted = {"executor": "slurm", "job_id": "7", "submitted_at": at(submitted_age_s), "log": "/x/7.out"}
    if state is None:
        return Known("runs/x", {}, submitted)
    begun = {} if state == "queued" else {"attempt": 1, "heartbeat": at(beat_age_s), "reason": "why it ended"}
    return Known("runs/x", {"state": state} | begun | status, submitted, NOW - beat_age_s if begun else None)


RUNNING, DONE, COMPLETING = Entry("RUNNING"), Entry("NODE_FAIL"), Entry("COMPLETING")
PENDING = Entry("PENDING", "Resources")


@pytest.mark.parametrize(
    ("run", "entry", "unknown", "state", "words"),
    [
        # it waits, or is about to begin
        (known(None, submitted_age_s=None), None, None, "new", "never been started"),
        (known("queued", submitted_age_s=None), None, None, "queued", "it is being submitted"),
        (known("queued"), PENDING, None, "queued", "it waits for free nodes (Resources)"),
        (known("queued"), RUNNING, None, "starting", ""),
        (known("queued"), None, "it was submitted just now", "queued", "it has not begun; it was submitted just now"),
        (known("queued"), None, None, "lost", "it has not begun, and job 7 is not in the queue; see /x/7.out"),
        (known("queued"), Entry("FAILED"), None, "lost", "and job 7 ended as FAILED; see /x/7.out"),
        (known("queued"), Entry("CANCELLED"), None, "cancelled", "job 7 was cancelled in Slurm"),
        # it runs
        (known("running"), RUNNING, None, "running", ""),
        (known("running", 16, None), None, None, "running", ""),
        (known("running", 99), RUNNING, None, "running", "no heartbeat for 99 s"),
        (known("running", 99), COMPLETING, None, "running", "no heartbeat for 99 s"),
        (known("running", 99), None, "slurmctld is away", "running", "no heartbeat for 99 s; slurmctld is away"),
        # it is gone
        (known("running", 17, None), None, None, "lost", "no heartbeat for 17 s"),
        (known("running", 99), None, None, "lost", "no heartbeat for 99 s, and job 7 is not in the queue"),
        (known("running", 99), DONE, None, "lost", "and job 7 ended as NODE_FAIL"),
        (known("running", 99, None, slurm_job_id="8"), None, None, "lost", "and job 8 is not in the queue"),
        # it will go on
        (known("running", 99), PENDING, None, "requeued", "it waits for free nodes (Resources)"),
        (known("preempted", 9), PENDING, None, "requeued", "it waits for free nodes (Resources)"),
        (known("preempted", 9), RUNNING, None, "starting", ""),
        (known("failed", 9), RUNNING, None, "restarting", "why it ended"),
        (known("completed", 99, 9), PENDING, None, "requeued", "it waits for free nodes (Resources)"),
        (known("cancelled", 99, 9), RUNNING, None, "starting", ""),
        # it has ended
        (known("preempted", 9), None, None, "preempted", "why it ended"),
        (known("failed", 9), DONE, None, "failed", "why it ended"),
        (known("completed", 9), RUNNING, None, "completed", "why it ended"),
        (known("cancelled", 9), PENDING, None, "cancelled", "why it ended"),
        (known("completed", 9, None), None, None, "completed", "why it ended"),
    ],
)  # fmt: skip
def test_the_state_of_a_run(run: Known, entry: Entry | None, unknown: str | None, state: str, words: str) -> None:
    found = judged(run, entry, unknown, NOW)
    assert found.state == state
    assert words in found.why
    assert found.goes_on == (state in ("queued", "requeued", "starting", "running", "restarting"))


def test_a_run_on_a_store_may_be_silent_for_three_of_its_longer_heartbeats() -> None:
    for age_s, state in ((45, "running"), (47, "lost")):
        remote = known("running", age_s, None)
        assert judged(Known("memory://runs/x", remote.status, {}, NOW - age_s), None, None, NOW).state == state


def make(url: str, state: str, scores: tuple[float, ...] = (), mode: str = "max", **status: Any) -> Run:
    """A run as others have left it."""
    run = Run(url)
    from toolkit import storage

    storage.write(run.at("config.yaml"), f"checkpoint: {{best: {{metric: val/x, mode: {mode}}}}}\n".encode())
    lines = [{"step": step, "val/x": score, "train/samples_per_s": 10.0} for step, score in enumerate(scores)]
    storage.write(run.at("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())
    run.set_status(state, **{"attempt": 1, "step": 5, "total": 9, "epoch": 0, "host": "h", **status})
    return run


@pytest.mark.parametrize("root", ["", "memory://sweep"])
@pytest.mark.parametrize(("mode", "order"), [("max", "bcad"), ("min", "acbd")])
def test_runs_are_sorted_by_their_best_metric(root: str, mode: str, order: str, tmp_path: Path) -> None:
    root = f"{root}-{mode}" if root else str(tmp_path)
    for name, scores in (("a", (0.2, 0.1)), ("b", (0.9, 0.3)), ("c", (0.25,)), ("d", ())):
        make(f"{root}/{name}", "completed", scores, mode)
    found, many = views(root)
    assert many
    assert "".join(view.known.url[-1] for view in found) == order
    best = found[0].known.best
    assert best
    assert best["score"] == {"max": 0.9, "min": 0.1}[mode]


def test_who_waits_for_a_run_does_not_read_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit import storage

    run, real, read = make(str(tmp_path), "completed", (0.5,)), storage.read, list[str]()
    monkeypatch.setattr(storage, "read", lambda url, *span: read.append(Path(url).name) or real(url, *span))
    assert (view(run.url).state, views(run.url)[0][0].known.rate) == ("completed", 10.0)
    assert (read.count("metrics.jsonl"), read.count("config.yaml"), read.count("status.json")) == (1, 1, 2)


def test_a_damaged_run_hides_no_other(workplace: Workplace) -> None:
    make(str(workplace.folder / "runs/good"), "completed")
    (workplace.folder / "runs/bad").mkdir()
    (workplace.folder / "runs/bad/status.json").write_text('{"st')
    (workplace.folder / "runs/notes.txt").write_text("")
    said = workplace.run("status")
    assert "bad: runs/bad/status.json is damaged" in said.replace(str(workplace.folder) + "/", "")
    assert "completed" in said


def test_of_one_run_alone_what_is_damaged_is_named(tmp_path: Path) -> None:
    run = make(str(tmp_path), "completed")
    Path(run.at("submitted.json")).write_bytes(b"\xff")
    with pytest.raises(JobError, match=r"is damaged \('utf-8' codec"):
        views(run.url)


def test_status_as_json_is_for_machines(workplace: Workplace) -> None:
    make(
        str(workplace.folder / "runs/x"), "failed", (0.5,), reason="rank 1 broke", slurm_job_id="12", hosts=["n1", "n2"]
    )
    (workplace.folder / "runs/x/postmortem.md").write_text("")
    one = json.loads(workplace.run("status", "runs/x", "--json", PATH=""))
    (same,) = json.loads(workplace.run("status", "--json", PATH=""))
    assert same | {"heartbeat_age_s": 0} == one | {"heartbeat_age_s": 0}
    expected = {"run": "runs/x", "state": "failed", "why": "rank 1 broke", "step": 5, "best": 0.5, "job_id": "12"}
    assert one | expected == one
    assert (one["hosts"], one["postmortem"]) == (["n1", "n2"], "runs/x/postmortem.md")
    words = workplace.run("status", "runs/x")
    for line in ("runs/x: failed at step 5 of 9", "rank 1 broke", "attempt 1, job 12 on n1, n2", "best val/x: 0.5"):
        assert line in words


@pytest.mark.parametrize("words", [("status", "none"), ("status",), ("logs", "none"), ("cancel", "none")])
def test_what_is_no_run_is_refused(workplace: Workplace, words: tuple[str, ...]) -> None:
    assert "give the directory of" in workplace.refused(*words)


def test_a_run_is_found_lost_after_kill_9_and_running_before(workplace: Workplace) -> None:
    process = workplace.start("train", "digits.yaml", "run.dir=runs/x", *LONG)
    try:
        url = str(workplace.folder / "runs/x")
        wait_for((workplace.folder / "runs/x/status.json").exists, "a status")
        assert view(url).state == "running"
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert view(url).state == "running", "it may only be slow"
    status = workplace.status("runs/x") | {"heartbeat": at(NOW - time.time() + 20)}
    (workplace.folder / "runs/x/status.json").write_text(json.dumps(status))
    claim = next((workplace.folder / "runs/x/lock").glob("attempt-*.json"))
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"heartbeat": time.time() - 10}))
    assert view(url).state == "running", "the lock is still renewed: a long step"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"heartbeat": time.time() - 20}))
    assert view(url).state == "lost"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cancelled_run_has_saved_everything_and_can_be_started_again(workplace: Workplace, processes: int) -> None:
    words = ("train", "digits.yaml", "run.dir=runs/x", "--processes", str(processes))
    process = workplace.start(*words, *LONG)
    try:
        wait_for((workplace.folder / "runs/x/status.json").exists, "a status")
        said = workplace.run("cancel", "runs/x", "--timeout-s", "60")
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert "runs/x is cancelled at step" in said
    status = workplace.status("runs/x")
    assert (status["state"], status["exit"], status["reason"]) == ("cancelled", 75, "a cancel request in the run")
    assert Run(str(workplace.folder / "runs/x")).newest_checkpoint() == status["step"]
    assert not list((workplace.folder / "runs/x/requests").iterdir())
    assert "has ended already: it is cancelled" in workplace.run("cancel", "runs/x")
    assert "completed" in workplace.run(*words, f"train.max_steps={status['step'] + 5}")


def test_a_running_run_is_asked_to_end_from_where_there_is_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run = make(str(tmp_path / "x"), "running", heartbeat=now)
    submitted = {"executor": "slurm", "job_id": "7", "pid": None, "host": "login", "submitted_at": at(NOW), "log": None}
    (tmp_path / "x/submitted.json").write_text(json.dumps(submitted))
    with pytest.raises(RunError, match="no scancel here|no scontrol here"):
        cancel(run.url, 5, now=True, say=print)

    def granted(words: str) -> None:
        said.append(words)
        run.set_status("cancelled", reason="a cancel request in the run")

    said = list[str]()
    cancel(run.url, 5, now=False, say=granted)
    assert "asked" in said[0]
    assert "is cancelled at step" in said[1]
    run.set_status("preempted", reason="no time was left")
    with pytest.raises(RunError, match="no scontrol here"):
        cancel(run.url, 5, now=False, say=print)  # who can say whether it waits to be started again?


def test_a_run_submitted_to_this_machine_is_ended_at_once(workplace: Workplace) -> None:
    process = workplace.start("train", "digits.yaml", "run.dir=runs/x", *LONG)
    submitted = {"executor": "local", "job_id": "1", "pid": process.pid, "host": socket.gethostname(),
                 "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "log": None}  # fmt: skip
    try:
        wait_for((workplace.folder / "runs/x/status.json").exists, "a status")
        (workplace.folder / "runs/x/submitted.json").write_text(json.dumps(submitted))
        assert view(str(workplace.folder / "runs/x")).state == "running"
        assert "runs/x is cancelled" in workplace.run("cancel", "runs/x", "--now")
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert workplace.status("runs/x")["state"] == "cancelled"


def test_a_cancel_request_that_came_too_late_does_not_end_the_next_start(tmp_path: Path) -> None:
    for state, kept in (("completed", False), ("cancelled", False), ("preempted", True), ("running", True)):
        run = make(str(tmp_path / state), state)
        run.ask("cancel")
        run.open("", {"train": {}}, {}, [], {"host": "h", "pid": 1})
        run.close()
        assert (tmp_path / state / "requests/cancel").exists() == kept, state


def said(url: str, *, rank: int = 0, attempt: int | None = None, onwards: bool = False) -> str:
    found: list[bytes] = []
    logs.follow(url, rank, attempt, onwards, found.append)
    return b"".join(found).decode()


def test_the_log_of_a_rank_and_an_attempt(tmp_path: Path) -> None:
    run = make(str(tmp_path), "completed")
    (tmp_path / "logs").mkdir()
    for attempt, rank in ((1, 0), (1, 1), (2, 0), (10, 0)):
        (tmp_path / f"logs/attempt-{attempt}-rank-{rank}.log").write_text(f"{attempt}-{rank}\n")
    assert said(run.url) == "10-0\n"
    assert said(run.url, attempt=1, rank=1) == "1-1\n"
    assert said(run.url, onwards=True) == "10-0\n"
    with pytest.raises(ValueError, match="no log of rank 1 in attempt 2; it has attempt 1: ranks 0, 1; attempt 2: "):
        said(run.url, attempt=2, rank=1)
    with pytest.raises(ValueError, match="no log of rank 7; it has attempt 1"):
        said(run.url, rank=7)


def test_of_a_run_without_ranks_the_scheduler_has_the_log(tmp_path: Path) -> None:
    run = make(str(tmp_path / "x"), "failed")
    with pytest.raises(ValueError, match="one process alone speaks on its console"):
        said(run.url)
    submitted = {"executor": "local", "pid": 1, "host": "other", "submitted_at": at(0), "log": f"{tmp_path}/job.out"}
    (tmp_path / "x/submitted.json").write_text(json.dumps(submitted))
    with pytest.raises(ValueError, match=r"has said nothing yet; its log will be .*job\.out"):
        said(run.url)
    (tmp_path / "job.out").write_text("sbatch could not\n")
    assert said(run.url) == "sbatch could not\n"


def test_follow_goes_on_across_attempts_until_the_run_is_over(workplace: Workplace) -> None:
    run = make(str(workplace.folder / "x"), "running")
    folder = workplace.folder / "x/logs"
    folder.mkdir()
    (folder / "attempt-1-rank-0.log").write_text("one\n")
    process = workplace.start("logs", "x", "--follow")
    try:
        assert process.stdout
        assert process.stdout.readline() == "one\n"
        with open(folder / "attempt-1-rank-0.log", "a") as file:
            file.write("two\n")
        assert process.stdout.readline() == "two\n"
        run.set_status("running")
        (folder / "attempt-2-rank-0.log").write_text("three\n")
        assert process.stdout.readline() == "three\n"
        assert process.poll() is None
        run.set_status("completed")
        assert (*process.communicate(timeout=60), process.returncode) == ("", "", 0)
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_follow_has_the_last_words_which_come_after_the_status(tmp_path: Path) -> None:
    run = make(str(tmp_path), "completed")
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs/attempt-1-rank-0.log"
    log.write_text("one\n")
    late = threading.Timer(1.0, log.write_text, ["one\nlast\n"])
    late.start()
    assert said(run.url, onwards=True) == "one\nlast\n"
    late.join()


def test_follow_ends_with_ctrl_c_and_when_nobody_reads(workplace: Workplace) -> None:
    run = make(str(workplace.folder / "x"), "running")
    (workplace.folder / "x/logs").mkdir()
    (workplace.folder / "x/logs/attempt-1-rank-0.log").write_text("line\n" * 100_000)
    for end, status in ((lambda process: process.send_signal(signal.SIGINT), 130), (lambda p: p.stdout.close(), 0)):
        run.set_status("running")
        process = workplace.start("logs", "x", "--follow")
        try:
            assert process.stdout
            process.stdout.readline()
            end(process)
            assert process.wait(60) == status
            assert process.stderr
            assert process.stderr.read() == ""
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
            process.stdout.close()


def test_commands_that_look_import_no_torch() -> None:
    code = "import sys, toolkit.cli, toolkit.cluster.report, toolkit.cluster.logs, toolkit.cluster.cancel\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"no {what} within {timeout_s} s"
        time.sleep(0.05)
