"""On each node of a Slurm step: starts this node's ranks, tells the supervisor what can be seen of them, ends them.

    python -m toolkit.cluster.agent      by srun, one a node; see toolkit/cluster/step.py

It decides nothing, but for this: when its supervisor is gone or silent, or its own slurmstepd is killed, it ends the
ranks, so that none is left that nobody watches.
"""

import base64
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import psutil

from toolkit.cluster.link import Link
from toolkit.node import Meeting, Node, free_port, new_folder
from toolkit.process import be_subreaper, die_with_parent
from toolkit.signals import STOPPING

SUPERVISOR, TOKEN = "TOOLKIT_SUPERVISOR", "TOOLKIT_SUPERVISOR_TOKEN"  # port; what proves that we belong to it
PERIOD_S = 0.25
FENCE_S = 20.0  # without a word of the supervisor; longer than it waits for one of ours
CONNECT_S = 30.0
PIECE = 1 << 20  # bytes of a log in one message


def main() -> int:
    """Returns 0 if the ranks were ended in order, whatever became of them."""
    die_with_parent()
    be_subreaper()
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in STOPPING:  # a scheduler sends them to everybody; only the supervisor knows what they are worth
        signal.signal(number, lambda number, frame: heard.put(signal.Signals(number).name))
    environment = dict(os.environ)
    link = _connected(environment)
    address = link.connection.getsockname()[0]
    link.send(
        token=environment.pop(TOKEN),
        node=int(environment["SLURM_NODEID"]),
        step=environment["SLURM_STEP_ID"],
        host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        address=address,
        port=free_port(address),
    )
    start = next((message for message in link.messages() if message.keys() & {"words", "end"}), None)
    if start is None:
        return 1
    if "end" in start:
        link.send(ended=[])
        return 0
    if missing := [path for path in start["paths"] if not os.path.exists(path)]:
        link.send(missing=missing)
        return 0
    meeting = Meeting(start["address"], start["port"], start["nodes"], start["node"], _interface(address))
    with new_folder() as folder:
        node = Node(folder, start["processes"], meeting, console=False)
        if start["stop"]:
            node.stop(signal.Signals(start["stop"]))
        Agent(node, link, heard).run(start["words"], environment)
    return 0


class Agent:
    """The ranks of this node, seen and ended from afar."""

    def __init__(self, node: Node, link: Link, heard: "queue.SimpleQueue[str]") -> None:
        self.node, self.link, self.heard = node, link, heard
        self.over = threading.Event()
        self._sent: dict[str, int] = {}

    def run(self, words: list[str], environment: Mapping[str, str]) -> None:
        """Until the supervisor says so, or is no more."""
        try:
            self.node.start(words, environment)
            threading.Thread(target=self._listen, name="toolkit-link", daemon=True).start()
            while not self.over.wait(PERIOD_S):
                self._tell()
        except OSError:
            pass  # the supervisor is gone
        finally:
            undead = self.node.end()
            with suppress(OSError):
                self._tell()
                self.link.send(ended=undead)
            self.link.close()

    def _tell(self) -> None:
        """What can be seen now, and what the ranks have said since the last time."""
        for name, piece in self._news():
            self.link.send(log=name, content=base64.b64encode(piece).decode())
        while not self.heard.empty():
            self.link.send(signal=self.heard.get())
        self.link.send(look=self.node.look().encoded())

    def _news(self) -> Iterator[tuple[str, bytes]]:
        folder = self.node.folder
        for path in sorted([*folder.glob("*.log"), *folder.glob("nccl-trace-*")]):
            with open(path, "rb") as file:
                file.seek(self._sent.get(path.name, 0))
                while piece := file.read(PIECE):
                    self._sent[path.name] = file.tell()
                    yield path.name, piece

    def _listen(self) -> None:
        for message in self.link.messages():
            if "stop" in message:
                self.node.stop(signal.Signals(message["stop"]))
            if "death" in message:
                self._answer(death=self.node.death(message["death"]))
            if "where" in message:
                self._answer(where=list(self.node.where().items()))
            if "end" in message:
                break
        self.over.set()

    def _answer(self, **answer: Any) -> None:
        with suppress(OSError):  # then the supervisor is gone, and the next message is that
            self.link.send(**answer)


def _connected(environment: Mapping[str, str]) -> Link:
    """To the supervisor on the node where srun was started, by the address over which Slurm itself talks to it."""
    address, port = environment["SLURM_LAUNCH_NODE_IPADDR"], int(environment[SUPERVISOR])
    return Link(socket.create_connection((address, port), timeout=CONNECT_S), FENCE_S)


def _interface(address: str) -> str | None:
    """The name of the network interface that has an address: gloo would look up the host's name, which may mean 127."""
    found = psutil.net_if_addrs().items()
    return next((name for name, ends in found if any(end.address == address for end in ends)), None)


if __name__ == "__main__":
    sys.exit(main())
