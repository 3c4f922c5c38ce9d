"""A job that Slurm suspends stands still on all nodes at once: when it goes on, nobody has been silent."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from toolkit.cluster import link, step
from toolkit.cluster.far import Far
from toolkit.cluster.link import Link
from toolkit.cluster.step import SILENT_S, Step

# Says what it hears, to the end.
READER = """
import socket, sys
from toolkit.cluster.link import Link
print("here", flush=True)
for message in Link(socket.socket(fileno=int(sys.argv[1])), 4.0).messages():
    print(message["word"], flush=True)
"""


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


def test_who_was_suspended_for_longer_than_its_patience_still_listens() -> None:
    ours, its = connected()
    with ours, its, subprocess.Popen(
        [sys.executable, "-c", READER, str(its.fileno())], pass_fds=[its.fileno()], env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        its.close()
        try:
            assert reader.stdout
            assert reader.stdout.readline() == "here\n"
            reader.send_signal(signal.SIGSTOP)
            time.sleep(4.5)
            reader.send_signal(signal.SIGCONT)
            time.sleep(0.3)  # the other end is a node that goes on later
            ours.sendall(b'{"word": "hello"}\n')
            assert reader.stdout.readline() == "hello\n"
            assert reader.stdout.readline() == "", "it ends, once it has heard nothing for so long"
            assert reader.wait(10) == 0
        finally:
            reader.kill()


def test_a_piece_that_comes_bit_by_bit_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "WAIT_S", 0.01)
    left, right = connected()
    with left, right:
        left.sendall(b'{"a": 1}\n{"b"')
        heard = Link(right, 0.5).messages()
        assert next(heard) == {"a": 1}
        left.sendall(b': "' + b"x" * 10**5 + b'"}\n')
        assert next(heard) == {"b": "x" * 10**5}
        assert next(heard, "over") == "over"


def test_after_a_suspension_every_node_has_the_time_of_one_that_has_just_been_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    clock: Any = SimpleNamespace(monotonic=lambda: now_s, time=time.time)
    for module in (step, sys.modules[Far.__module__]):
        monkeypatch.setattr(module, "time", clock)
    here = Step(tmp_path, [], ["n1", "n2"], 1, patience_s=60)
    silent: Any = SimpleNamespace(close=lambda: None)
    here.nodes[0] = Far(silent, {"host": "n1", "step": "0", "address": "::1", "port": 1})
    here.nodes[0].started, here.started_s = True, now_s

    def looked(s: float) -> dict[str, str]:
        """So much later."""
        nonlocal now_s
        now_s += s
        return dict(here.look().lost)

    assert looked(0.1) == {}
    assert looked(3600) == {}
    assert [looked(1) for _ in range(int(SILENT_S))] == [{}] * int(SILENT_S)
    assert list(looked(1)) == ["n1"], "it has not come back"
    here.nodes[0].heard_s = float("-inf")
    assert "has lost its agent" in looked(3600)["n1"]
