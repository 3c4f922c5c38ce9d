"""What ranks say is kept in the run, also in a store, where nothing can be appended and each answer takes its time."""

import time
from pathlib import Path
from typing import Any

import pytest

from toolkit import logs, storage
from toolkit.cluster.logs import _pass_on
from toolkit.run import Run


def _copied(kept: logs.KeptLogs) -> None:
    kept._next_s = 0.0
    kept.keep(lambda: 1)
    assert kept._thread
    kept._thread.join(30)


def test_of_a_long_log_a_store_has_the_end_and_all_of_it_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "WHILE_RUNNING", 10)
    monkeypatch.setattr(logs, "AT_THE_END", 30)
    run = Run("memory://logs/long")
    log, url, shown = tmp_path / "rank-0.log", run.at("logs", "attempt-1-rank-0.log"), list[bytes]()
    kept = logs.KeptLogs(run, tmp_path)
    offset = 0
    for said, there in (
        (b"1234\n", b"1234\n"),
        (b"abcdefgh\n", b"[the first 4 bytes are left out here]\n\nabcdefgh\n"),
        (b"xyz\n", b"[the first 8 bytes are left out here]\ndefgh\nxyz\n"),
    ):
        with open(log, "ab") as file:
            file.write(said)
        _copied(kept)
        assert storage.read(url) == there
        offset = _pass_on(url, offset, shown.append)
        assert b"".join(shown) == log.read_bytes(), "who follows it misses nothing"
    kept.finish(1)
    assert storage.read(url) == log.read_bytes()
    with open(log, "ab") as file:
        file.write(b"." * 30)
    kept.finish(1)
    assert storage.read(url) == b"[the first 18 bytes are left out here]\n" + b"." * 30
    assert _pass_on(url, 0, shown.append) == 48


def test_a_slow_store_holds_up_the_next_start_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = storage.write

    def slow(*args: Any, **more: Any) -> None:
        time.sleep(0.2)
        real(*args, **more)

    monkeypatch.setattr(storage, "write", slow)
    for rank in range(40):
        (tmp_path / f"rank-{rank}.log").write_text("last words")
    run, began_s = Run("memory://logs/many"), time.monotonic()
    logs.KeptLogs(run, tmp_path).finish(1)
    assert time.monotonic() - began_s < 40 * 0.2 / 2, "several at a time"
    assert len(storage.names(run.at("logs"))) == 40
    assert not capfd.readouterr().err
    monkeypatch.setattr(logs, "FINISH_S", 0.3)
    began_s = time.monotonic()
    logs.KeptLogs(Run("memory://logs/late"), tmp_path).finish(1)
    assert time.monotonic() - began_s < 3
    assert "of 40 logs are not all in memory://logs/late/logs: 0 s were not enough" in capfd.readouterr().err
