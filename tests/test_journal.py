"""Metrics on disk: one line a step, whatever is killed, whatever is full."""

import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_disk_of
from toolkit import storage
from toolkit.journal import Journal


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a journal may lie: on disk, and where nothing can be appended."""
    place = str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path.name}"
    yield place + "/m"
    storage.remove(place)


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_of("16k", tmp_path) as place:
        yield place


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


def test_a_journal_gives_back_its_lines(url: str) -> None:
    journal = Journal(url)
    assert journal.read() == []
    journal.open(0)
    lines = [{"step": 1, "train/loss": 0.1 + 0.2}, {"step": 2, "note": "größer\u2028 \n"}]
    for line in lines:
        journal.append(line)
    journal.close()
    assert journal.read() == lines


def test_what_is_no_finite_number_is_null(url: str) -> None:
    journal = Journal(url)
    journal.open(0)
    line = {"step": 1, "a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 0.0, "e": None, "f": 1e300}
    journal.append(line)
    journal.close()
    assert journal.read() == [line | {"a": None, "b": None, "c": None}]
    assert b"NaN" not in storage.read(url)


@pytest.mark.parametrize("last_step", [0, 3, 5, 9])
def test_a_resumed_journal_has_one_line_a_step_and_the_newest(url: str, last_step: int) -> None:
    written(url, 0, 1, 2, 3, 4, 5)
    resumed = written(url, last_step, *range(last_step + 1, 7), attempt=2)
    kept = min(last_step, 5)
    assert [(line["step"], line["attempt"]) for line in resumed.read()] == [
        *((step, 1) for step in range(1, kept + 1)),
        *((step, 2) for step in range(last_step + 1, 7)),
    ]


@pytest.mark.parametrize("torn", ['{"ste', '{"step": 3}', "{"])
def test_a_last_line_that_a_kill_cut_short_is_ignored_and_then_gone(url: str, torn: str) -> None:
    journal = written(url, 0, 1, 2)
    storage.write(url, storage.read(url) + torn.encode())
    assert steps_of(journal) == [1, 2]
    assert steps_of(written(url, 5, 6)) == [1, 2, 6]


def test_a_local_journal_has_every_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    place = str(tmp_path / "m")
    journal = Journal(place)
    journal.open(0)
    for step in (1, 2):
        journal.append({"step": step})
        assert steps_of(Journal(place)) == list(range(1, step + 1))
    assert not journal.overdue
    journal.close()


def test_a_remote_journal_spools_until_it_is_closed_and_leaves_no_spool(tmp_path: Path, spool: Path) -> None:
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


def test_a_remote_journal_says_when_it_is_overdue_and_is_brought_up_to_date_when_asked(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, now_s = f"memory://{tmp_path.name}/m", [1000.0]
    monkeypatch.setattr("toolkit.journal.time.monotonic", lambda: now_s[0])
    journal, seen = Journal(remote), []
    assert not journal.overdue  # not before it is opened
    journal.open(0)
    for step, wait_s in enumerate([0, 1, Journal.UPLOAD_S - 1.5, 2, 1], 1):
        now_s[0] += wait_s
        journal.append({"step": step})
        if journal.overdue:
            journal.upload()
        seen.append((steps_of(Journal(remote)) or [0])[-1])
    assert seen == [1, 1, 1, 4, 4]
    journal.upload()
    assert steps_of(Journal(remote)) == [1, 2, 3, 4, 5]
    journal.close()
    assert not journal.overdue
    storage.remove(remote)


def test_an_upload_before_the_first_line_takes_nothing_away(tmp_path: Path, spool: Path) -> None:
    remote = f"memory://{tmp_path.name}/m"
    written(remote, 0, 1, 2, 3)
    journal = Journal(remote)
    journal.open(2)
    journal.upload()
    assert steps_of(Journal(remote)) == [1, 2]
    journal.close()
    storage.remove(remote)


def test_what_another_attempt_has_written_is_left_alone_when_closed_so(tmp_path: Path, spool: Path) -> None:
    remote = f"memory://{tmp_path.name}/m"
    old = Journal(remote)
    old.open(0)
    old.append({"step": 1})
    written(remote, 0, 1, 2, attempt=2)
    old.close(upload=False)
    assert [line["attempt"] for line in Journal(remote).read()] == [2, 2]
    assert list(spool.iterdir()) == []
    storage.remove(remote)


def test_an_upload_that_comes_while_the_journal_is_closed_does_nothing(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, write = f"memory://{tmp_path.name}/m", storage.write
    journal = Journal(remote)
    journal.open(0)
    journal.append({"step": 1})
    failed: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda what: failed.append(what.exc_value))
    beat = threading.Thread(target=journal.upload)

    def slow(*args: Any, **options: Any) -> None:
        if not beat.ident:
            beat.start()  # and waits, for closing has begun its own
        write(*args, **options)

    monkeypatch.setattr(storage, "write", slow)
    journal.close()
    beat.join(30)
    assert not failed
    assert steps_of(Journal(remote)) == [1]
    storage.remove(remote)


def test_lines_that_find_no_room_are_kept_and_written_when_there_is_some(url: str, spool: Path) -> None:
    lines = [{"step": step, "text": "x" * 300} for step in range(1, 21)]
    journal = Journal(url)
    journal.open(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # ends in the middle of the fourth line
    try:
        for line in lines[:10]:
            journal.append(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in (journal.problem or "")
    assert storage.shown(url) in (journal.problem or "")
    if storage.local_path(url):
        assert steps_of(Journal(url)) == [1, 2, 3]  # what is there is whole, but for its end
    for line in lines[10:]:
        journal.append(line)
    assert journal.problem is None
    journal.close()
    assert journal.read() == lines


def test_a_journal_that_is_closed_on_a_full_disk_says_so(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "m"))
    journal.open(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        journal.append({"step": 1, "text": "x" * 300})
        with pytest.raises(OSError, match="m cannot be written"):
            journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_was_full_for_a_while_tears_no_line(small_disk: Path) -> None:
    place, ballast = small_disk / "m", small_disk / "ballast"
    journal, lines = Journal(str(place)), [{"step": step, "text": "x" * 1100} for step in range(1, 9)]
    journal.open(0)
    ballast.write_bytes(b"x" * (12 << 10))  # which leaves one page
    for line in lines[:5]:
        journal.append(line)
    assert "No space left" in (journal.problem or "")
    assert place.stat().st_size == 4096, "the fourth line is torn"
    ballast.unlink()
    for line in lines[5:]:
        journal.append(line)
    assert journal.problem is None
    assert [json.loads(line) for line in place.read_text().splitlines()] == lines
    journal.close()


def test_a_line_torn_by_a_full_disk_and_then_a_kill_is_gone(small_disk: Path) -> None:
    place, ballast = str(small_disk / "m"), small_disk / "ballast"
    journal = Journal(place)
    journal.open(0)
    ballast.write_bytes(b"x" * (12 << 10))
    for step in range(1, 6):
        journal.append({"step": step, "text": "x" * 1100})
    journal._file.close()  # killed
    ballast.unlink()
    assert steps_of(written(place, 4, 4, 5)) == [1, 2, 3, 4, 5]
