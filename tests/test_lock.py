"""One writer at a time: who gets the lock, who is refused, who is taken over, what the one who lost may still do."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from toolkit import lock, storage
from toolkit.errors import JobError, RunError
from toolkit.lock import Lock, holder_of

HERE = {
    "host": "node-1", "pid": os.getpid(), "pid_namespace": "pid:[1]", "boot_id": "boot-1", "slurm_job_id": None,
    "slurm_restart_count": 0,
}  # fmt: skip
ELSEWHERE = HERE | {"host": "node-2", "pid": 1234, "boot_id": "boot-2"}

NOT_WATCHED_S = lock.BEATS_MISSED * lock.BEAT_S / 2  # nobody takes that long, and to watch a claim takes longer

RACER = """
import json
import os
import sys
from toolkit.errors import JobError
from toolkit.lock import Lock
lock = Lock(sys.argv[1], json.loads(sys.argv[2]) | {"pid": os.getpid()})
print("ready", flush=True)
sys.stdin.readline()
try:
    print("won", lock.claim(), flush=True)
except JobError as refusal:
    print("refused", refusal, flush=True)
sys.stdin.readline()
lock.release()
"""

Claim = Callable[..., Lock]


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    place = str(tmp_path / "run" / "lock") if request.param == "folder" else f"memory://{tmp_path.name}/run/lock"
    yield place
    storage.remove(place)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> float:
    """Heartbeats that come five times a second; returns how long watching for one takes."""
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "REMOTE_BEAT_S", 0.2)
    return lock.BEATS_MISSED * 0.2


@pytest.fixture
def patient(quick: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As quick, for a holder that beats, which may be late now and then."""
    monkeypatch.setattr(lock, "BEATS_MISSED", 100)


@pytest.fixture
def claimed(url: str) -> Iterator[Claim]:
    """Claims the lock for an identity, until the end of the test."""
    with ExitStack() as stack:

        def claim(identity: dict[str, Any] = HERE, **options: Any) -> Lock:
            one = Lock(url, identity, **options)
            one.claim()
            stack.callback(one.release)
            return one

        yield claim


def forge(url: str, attempt: int = 1, age_s: float = 0.0, **changed: Any) -> str:
    """A claim that somebody else has left; returns its URL."""
    now_s = time.time() - age_s
    times = {"claimed": now_s, "heartbeat": now_s, "released": False}
    place = storage.join(url, f"attempt-{attempt:04d}.json")
    storage.write(place, json.dumps({"attempt": attempt} | HERE | times | changed).encode())
    return place


def claim_of(url: str) -> dict[str, Any]:
    (name,) = storage.names(url)
    return json.loads(storage.read(storage.join(url, name)))


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def race(place: str, **environment: str) -> list[str]:
    """What eight processes say that claim a lock in the same moment."""
    words = [sys.executable, "-c", RACER, place, json.dumps(HERE)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(words, env=os.environ | environment, **pipes) for _ in range(8)]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        return [racer.stdout.readline() for racer in racers]
    finally:
        for racer in racers:
            racer.communicate("end\n", timeout=60)


def test_of_eight_that_start_at_once_one_gets_the_attempt(tmp_path: Path) -> None:
    said = race(place := str(tmp_path / "lock"))
    assert sorted(words.split()[0] for words in said) == ["refused"] * 7 + ["won"]
    assert "won 1\n" in said
    assert storage.names(place) == ["attempt-0001.json"]


def test_whoever_comes_second_is_told_who_holds_the_lock(url: str) -> None:
    place = forge(url, attempt=7, age_s=3, slurm_job_id="99")
    before = storage.read(place)
    with pytest.raises(JobError, match=r"held by attempt 7 on host node-1 \(pid (\d+), Slurm job 99\)") as refusal:
        Lock(url, HERE).claim()
    assert f"pid {os.getpid()}" in str(refusal.value)
    assert re.search("heartbeat [3-9] s ago", str(refusal.value))
    assert "--fresh" in str(refusal.value)
    assert storage.names(url) == ["attempt-0007.json"]
    assert storage.read(place) == before


def test_who_was_refused_lets_go_of_nothing(url: str) -> None:
    forge(url)
    loser = Lock(url, HERE)
    with pytest.raises(JobError):
        loser.claim()
    loser.release()
    assert not claim_of(url)["released"]


def test_a_killed_holder_on_this_machine_is_taken_over_at_once(
    url: str, claimed: Claim, stranger: subprocess.Popen[bytes]
) -> None:
    forge(url, pid=stranger.pid)
    with pytest.raises(JobError):
        Lock(url, HERE).claim()
    stranger.kill()
    while psutil.Process(stranger.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has asked for its status yet
        time.sleep(0.001)
    started_s = time.monotonic()
    assert claimed().attempt == 2
    assert time.monotonic() - started_s < NOT_WATCHED_S


def test_a_pid_that_was_given_away_again_is_not_the_holder(url: str, claimed: Claim) -> None:
    forge(url, claimed=psutil.Process().create_time() - 60)  # this process is younger than the claim
    assert claimed().attempt == 2


def test_a_lock_that_was_let_go_is_free_at_once(url: str, claimed: Claim) -> None:
    first = claimed()
    with pytest.raises(JobError):
        claimed()
    first.release()
    assert claim_of(url)["released"]
    started_s = time.monotonic()
    assert claimed().attempt == 2
    assert time.monotonic() - started_s < NOT_WATCHED_S


def test_a_holder_elsewhere_that_stands_still_is_watched_and_taken_over(url: str, claimed: Claim, quick: float) -> None:
    forge(url, **ELSEWHERE)
    said, late = [], Lock(url, HERE)
    started_s = time.monotonic()
    try:
        assert late.claim(say=said.append) == 2
        assert time.monotonic() - started_s >= quick
    finally:
        late.release()
    assert len(said) == 1
    assert "host node-2 (pid 1234)" in said[0]
    assert "watching it" in said[0]


@pytest.mark.usefixtures("patient")
def test_a_holder_elsewhere_whose_heart_beats_is_not_taken_over(url: str, claimed: Claim) -> None:
    claimed(ELSEWHERE)
    for _ in range(3):
        with pytest.raises(JobError, match="node-2"):
            Lock(url, HERE).claim()
    assert storage.names(url) == ["attempt-0001.json"]


def test_a_clock_that_is_ahead_does_not_keep_a_lock(url: str, claimed: Claim, quick: float) -> None:
    forge(url, **ELSEWHERE, age_s=-3600)  # an hour ahead, and dead
    assert claimed().attempt == 2


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("ahead_s", [-300, 3600])
def test_a_wrong_clock_does_not_break_a_lock(url: str, ahead_s: float) -> None:
    place, beats = forge(url, **ELSEWHERE, age_s=-ahead_s), []

    def beat(_: str) -> None:
        beats.append(forge(url, **ELSEWHERE, age_s=-ahead_s))

    with pytest.raises(JobError):
        Lock(url, HERE).claim(say=beat)
    assert beats == [place]


def test_who_watches_and_stands_still_looks_again_before_taking_over(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is suspended for ten minutes, and only after that does the holder's next heartbeat come."""
    forge(url, **ELSEWHERE)
    now_s, pauses = [0.0], []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        now_s[0] += 600 if len(pauses) == 1 else pause_s
        if len(pauses) == 2:
            forge(url, **ELSEWHERE)

    clock = SimpleNamespace(monotonic=lambda: now_s[0], sleep=sleep, time=time.time)
    monkeypatch.setattr(lock, "time", clock)
    with pytest.raises(JobError, match="node-2"):
        Lock(url, HERE).claim()
    assert len(pauses) == 2


def test_a_holder_elsewhere_that_lets_go_while_it_is_watched_is_followed(url: str, quick: float) -> None:
    place = forge(url, **ELSEWHERE)
    released = json.loads(storage.read(place)) | {"released": True, "heartbeat": time.time()}
    late = Lock(url, HERE)
    try:
        assert late.claim(say=lambda words: storage.write(place, json.dumps(released).encode())) == 2
    finally:
        late.release()


def test_a_heartbeat_of_long_ago_is_not_watched(url: str, claimed: Claim) -> None:
    forge(url, **ELSEWHERE, age_s=lock.ANCIENT_S + 1)
    started_s = time.monotonic()
    assert claimed().attempt == 2
    assert time.monotonic() - started_s < NOT_WATCHED_S


def test_a_machine_that_was_started_again_holds_nothing(url: str, claimed: Claim) -> None:
    forge(url, boot_id="boot-0", age_s=lock.BEATS_MISSED * lock.REMOTE_BEAT_S + 1)
    started_s = time.monotonic()
    assert claimed().attempt == 2
    assert time.monotonic() - started_s < NOT_WATCHED_S


@pytest.mark.usefixtures("patient")
def test_another_machine_of_the_same_name_is_believed_while_its_heart_beats(claimed: Claim) -> None:
    claimed(HERE | {"boot_id": "boot-0"})
    with pytest.raises(JobError):
        claimed()


@pytest.mark.usefixtures("patient")
def test_two_machines_that_do_not_know_their_boot_are_not_one(
    claimed: Claim, stranger: subprocess.Popen[bytes]
) -> None:
    stranger.kill()
    stranger.wait()
    nowhere = {"boot_id": None, "pid_namespace": None, "pid": stranger.pid}  # as on macOS; a pid that is free here
    claimed(HERE | nowhere | {"host": "mac-2"})
    with pytest.raises(JobError):
        claimed(HERE | nowhere | {"host": "mac-1"})
    assert claimed(HERE | nowhere | {"host": "mac-2"}).attempt == 2


@pytest.mark.parametrize(
    ("before", "now", "taken"), [(0, 1, True), (1, 3, True), (1, 1, False), (2, 1, False)], ids=str
)
def test_slurms_next_start_of_a_job_takes_over_at_once(
    url: str, claimed: Claim, before: int, now: int, taken: bool
) -> None:
    forge(url, slurm_job_id="77", slurm_restart_count=before)  # whose process runs
    me = HERE | {"slurm_job_id": "77", "slurm_restart_count": now}
    if taken:
        assert claimed(me).attempt == 2
    else:
        with pytest.raises(JobError):
            claimed(me)


def test_another_slurm_job_is_refused_however_often_it_was_started(url: str, claimed: Claim) -> None:
    forge(url, slurm_job_id="77")
    with pytest.raises(JobError, match="Slurm job 77"):
        claimed(HERE | {"slurm_job_id": "78", "slurm_restart_count": 5})


def test_an_attempt_has_at_least_the_number_it_is_told_and_no_claim_but_its_own_stays(url: str) -> None:
    for number, at_least, expected in ((1, 1, 1), (2, 1, 2), (3, 9, 9), (4, 4, 10)):
        one = Lock(url, HERE)
        assert one.claim(at_least) == expected, number
        assert storage.names(url) == [f"attempt-{expected:04d}.json"]
        one.release()


def test_the_heart_beats_in_the_claim(url: str, quick: float) -> None:
    beats, beaten = [], threading.Event()

    def on_beat() -> None:
        beats.append(claim_of(url)["heartbeat"])
        if len(beats) == 3:
            beaten.set()

    one = Lock(url, HERE, on_beat)
    one.claim()
    begun = claim_of(url)
    assert beaten.wait(30)
    one.release()
    assert begun["heartbeat"] < beats[0] < beats[1] < beats[2]
    assert claim_of(url)["claimed"] == begun["claimed"]
    assert not [thread for thread in threading.enumerate() if thread.name == "toolkit-lock"]


def test_who_was_taken_over_notices_says_by_whom_and_leaves_the_lock_alone(
    url: str, claimed: Claim, quick: float
) -> None:
    first = claimed()
    first.check()
    forge(url, attempt=2, **ELSEWHERE)
    with pytest.raises(RunError, match=r"attempt 2 on host node-2 \(pid 1234\) has taken over .*this is attempt 1"):
        first.check()
    with pytest.raises(RunError, match="has taken over"):
        first.raise_if_lost()
    first._thread.join(30)  # it beats no more
    first.release()
    assert json.loads(storage.read(storage.join(url, "attempt-0002.json")))["released"] is False


def test_the_heartbeat_finds_out_that_another_has_taken_over(url: str, claimed: Claim, quick: float) -> None:
    first = claimed()
    first.raise_if_lost()
    forge(url, attempt=2, **ELSEWHERE)
    first._thread.join(30)
    with pytest.raises(RunError, match="has taken over"):
        first.raise_if_lost()


def test_a_takeover_whose_claim_cannot_be_read_is_one(url: str, claimed: Claim, quick: float) -> None:
    first = claimed()
    storage.write(storage.join(url, "attempt-0002.json"), b"")  # as O_EXCL makes it, before it is filled
    with pytest.raises(RunError, match="attempt 2 .*has taken over"):
        first.check()
    first._thread.join(30)
    assert first.lost


def test_who_looked_at_a_claim_that_is_no_more_does_not_get_a_number_of_the_past(
    url: str, claimed: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed().release()
    late, looked = Lock(url, HERE), Lock._highest
    held = []

    def highest(self: Lock) -> Any:
        found = looked(self)
        if self is late and not held:  # two others come and go while this one thinks about what it has seen
            held.append(claimed())
            held[0].release()
            held.append(claimed())
        return found

    monkeypatch.setattr(Lock, "_highest", highest)
    with pytest.raises(JobError, match="held by attempt 3"):
        late.claim()
    assert storage.names(url) == ["attempt-0003.json"]


def test_a_damaged_claim_is_named(url: str) -> None:
    storage.write(storage.join(url, "attempt-0004.json"), b"\x00{")
    with pytest.raises(JobError, match=r"attempt-0004.json is damaged .*remove it"):
        Lock(url, HERE).claim()


def test_a_store_that_is_away_is_a_problem_that_passes(
    url: str, claimed: Claim, quick: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, write, away = claimed(), storage.write, threading.Event()
    seen = {True: threading.Event(), False: threading.Event()}

    def gone(*args: Any, **options: Any) -> None:
        if away.is_set():
            seen[True].set()
            raise OSError("the store is away")
        write(*args, **options)
        seen[False].set()

    monkeypatch.setattr(storage, "write", gone)
    away.set()
    assert seen[True].wait(30)
    seen[True].clear()
    assert seen[True].wait(30)  # so the first has been noted
    assert "the store is away" in (one.problem or "")
    seen[False].clear()
    away.clear()
    assert seen[False].wait(30)
    seen[False].clear()
    assert seen[False].wait(30)
    assert one.problem is None
    one.raise_if_lost()


def test_a_lock_is_let_go_of_without_its_store(url: str, claimed: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    one = claimed()

    def gone(*args: Any, **options: Any) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", gone)
        one.release()
    assert not claim_of(url)["released"]


@pytest.mark.usefixtures("patient")
def test_who_only_looks_sees_a_holder_whose_heart_beats(url: str, claimed: Claim) -> None:
    said: list[str] = []
    assert holder_of(url) is None
    one = claimed()
    assert holder_of(url, said.append)["attempt"] == 1
    assert "watching it" in said[0]
    one.release()
    assert holder_of(url) is None


@pytest.mark.usefixtures("quick")
def test_who_only_looks_sees_no_holder_that_was_killed(url: str) -> None:
    forge(url)
    assert holder_of(url) is None


def test_a_suspended_process_holds_its_lock(url: str, claimed: Claim, stranger: subprocess.Popen[bytes]) -> None:
    forge(url, pid=stranger.pid)
    stranger.send_signal(signal.SIGSTOP)
    with pytest.raises(JobError):
        claimed()
