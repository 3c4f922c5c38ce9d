"""One start of all ranks over the nodes of an allocation: srun starts an agent on each, and each its ranks.

What the agents see is looked at here, and what is wanted of them is sent to them, over TCP: srun says nothing of a
node that hangs, and nothing ever of a task whose slurmstepd was killed.
"""

import base64
import hmac
import os
import queue
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.attempt import Death, Look, Where
from toolkit.cluster.agent import SUPERVISOR, TOKEN
from toolkit.cluster.far import Far
from toolkit.cluster.link import Link
from toolkit.console import write_all
from toolkit.process import die_with_parent
from toolkit.pulse import Pulse

SILENT_S = 15.0  # then a node is down, or cut off
SUSPENDED_S = 5.0  # between two looks, if all of this has stood still: no node is silent for that
BEAT_S = 3.0  # so that agents know that somebody watches
HELLO_S = 10.0
DEATH_S, WHERE_S, END_S, SRUN_S = 10.0, 60.0, 40.0, 3.0  # how long an agent's answers, and srun's end, may take
_LOG = "srun.log"


class Step:
    """An `Attempt` over many nodes. `srun` is the command that starts an agent on each of `hosts`, with `processes`
    ranks each; `paths` must be there on every node; `warned` is told of signals that the scheduler has sent to agents,
    `cancel` ends a step that srun cannot; `additions` are srun's environment besides.
    """

    def __init__(
        self,
        folder: Path,
        srun: Sequence[str],
        hosts: Sequence[str],
        processes: int,
        paths: Sequence[str] = (),
        *,
        patience_s: float,
        warned: Callable[[signal.Signals], None] = lambda number: None,
        cancel: Callable[[str], None] = lambda step: None,
        additions: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda environment: {},
        image: str | None = None,
    ) -> None:
        self.folder, self.srun, self.hosts, self.paths = folder, list(srun), list(hosts), list(paths)
        self.per_node, self.processes = processes, processes * len(hosts)
        self.patience_s, self.warned, self.cancel = patience_s, warned, cancel
        self.additions, self.image = additions, image
        self.nodes: dict[int, Far] = {}
        self.token = secrets.token_hex(32)
        self.process: subprocess.Popen[bytes] | None = None
        self.listener: socket.socket | None = None
        self.stopping: signal.Signals | None = None
        self.console: queue.Queue[bytes] = queue.Queue(1000)
        self.ending = threading.Event()
        self._changing = threading.Lock()
        self._looked_s = self._awake_s = time.monotonic()  # at the last look; since the last time this was suspended

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """`toolkit WORDS` on every rank, once all agents are here."""
        self.words, self.started_s = list(words), time.monotonic()
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.listener = socket.create_server(("", 0), family=family, backlog=len(self.hosts) + 8, dualstack_ipv6=both)
        ours = {SUPERVISOR: str(self.listener.getsockname()[1]), TOKEN: self.token}
        with open(self.folder / _LOG, "wb") as log:
            self.process = subprocess.Popen(
                self.srun,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment) | ours | dict(self.additions(dict(environment) | ours)),
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - it only asks the kernel
            )
        self.showing = threading.Thread(target=self._show, name="toolkit-console", daemon=True)
        self.showing.start()
        for work in (partial(self._accept, self.listener), self._beat):
            threading.Thread(target=work, name="toolkit-step", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed by `end`
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._meet, args=[connection], name="toolkit-node", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        """Hear an agent out, to its end. Whoever does not know the token is sent away."""
        link = Link(connection, HELLO_S)
        hello = next(link.messages(), {})
        if not hmac.compare_digest(str(hello.get("token", "")).encode(errors="replace"), self.token.encode()):
            link.close()
            return
        link.be_patient(None)  # `look` is not
        node = Far(link, hello)
        with self._changing:
            if self.ending.is_set():
                link.close()
                return
            self.nodes[int(hello["node"])] = node
            if len(self.nodes) == len(self.hosts):  # this is the last that came
                self._start_all()
        try:
            for message in link.messages():
                node.heard_s = time.monotonic()
                self._heard(node, message)
        finally:
            link.close()
            node.heard_s = node.heard_s if node.over else float("-inf")

    def _start_all(self) -> None:
        """Have every agent start its ranks; a stop may have been wished before."""
        head = self.nodes[0]
        for number, node in sorted(self.nodes.items()):
            node.started, node.heard_s = True, time.monotonic()
            meeting = {"address": head.address, "port": head.port, "nodes": len(self.hosts), "node": number}
            meeting |= {"words": self.words, "processes": self.per_node, "paths": self.paths, "stop": self.stopping}
            self._send(node, meeting)

    def _heard(self, node: Far, message: Mapping[str, Any]) -> None:
        if "look" in message:
            node.look = Look.decoded(message["look"])
        if "log" in message:
            self._keep(node, os.path.basename(message["log"]), base64.b64decode(message["content"]))
        if "signal" in message:
            self.warned(signal.Signals[message["signal"]])
        if "missing" in message:
            node.missing, node.undead = message["missing"], []
        if "ended" in message:
            node.undead = message["ended"]
        for answer in ("death", "where"):
            if answer in message:
                node.answers.put(message[answer])

    def _keep(self, node: Far, name: str, content: bytes) -> None:
        """A piece of a log: of rank 0's also to this process's stdout, which the scheduler keeps."""
        name = f"torchrun-{node.host}.log" if name == "torchrun.log" else name
        with suppress(OSError), open(self.folder / name, "ab") as log:  # a full disk keeps nobody from being heard
            log.write(content)
        if name == "rank-0.log":
            with suppress(queue.Full):  # who reads it has stopped doing so
                self.console.put_nowait(content)

    def _show(self) -> None:
        """What rank 0 says, in a thread of its own: a file system that stands still must not look like a dead node."""
        with suppress(OSError):
            while not (self.ending.is_set() and self.console.empty()):
                with suppress(queue.Empty):
                    write_all(1, self.console.get(timeout=0.5))

    def _beat(self) -> None:
        while not self.ending.wait(BEAT_S):
            for node in list(self.nodes.values()):
                self._send(node, {"beat": True})

    @staticmethod
    def _send(node: Far, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # its end will be noticed where it is listened to
            node.link.send(**message)

    def look(self) -> Look:
        """What all agents have seen last."""
        if time.monotonic() - self._looked_s > SUSPENDED_S:
            self._awake_s = time.monotonic()
        self._looked_s = time.monotonic()
        status = self.process.poll() if self.process else None
        notes, pulses, gone, torchruns = dict[int, Any](), dict[int, Pulse](), list[int](), list[int | None]()
        with self._changing:
            nodes = dict(self.nodes)
        for number, node in nodes.items():
            notes |= self._unseen(number, node)
            notes |= node.look.notes
            pulses |= node.look.pulses
            gone += node.look.gone
            torchruns += node.look.torchruns
        torchruns += [status] * (len(self.hosts) - len(nodes))  # of those that have not come, srun may know
        places = {
            number * self.per_node + rank: node.host for number, node in nodes.items() for rank in range(self.per_node)
        }
        lost = {} if self.ending.is_set() else self._lost(nodes)
        return Look(notes, pulses, gone, torchruns, lost, places)

    def _unseen(self, number: int, node: Far) -> dict[int, Any]:
        """The last word of the first rank of a node that does not see what it must."""
        if not node.missing:
            return {}
        words = (
            f"node {node.host} does not see {', '.join(node.missing)}; give folders that all nodes share, such as "
            "those of your home or of the cluster's scratch space"
        )
        note = {"pid": 0, "host": node.host, "exit": 2, "message": words, "time_s": time.time(), "blamed": None}
        return {number * self.per_node: note}

    def _lost(self, nodes: Mapping[int, Far]) -> dict[str, str]:
        now_s, lost = time.monotonic(), {}
        for node in nodes.values():
            silent_s = now_s - max(node.heard_s, self._awake_s)
            if not node.over and node.heard_s == float("-inf"):
                lost[node.host] = "has lost its agent: that was killed, or its slurmstepd was, or the node went down"
            elif not node.over and node.started and silent_s > SILENT_S:
                lost[node.host] = f"gave no sign of life for {silent_s:.0f} s: it is down, or cut off from the network"
        here = {node.host for node in nodes.values()}
        late = [host for host in self.hosts if host not in here]
        ended = self.process is not None and self.process.poll() is not None
        if nodes and now_s - max(self.started_s, self._awake_s) > self.patience_s:
            lost |= dict.fromkeys(late, f"has not started its agent within {self.patience_s:g} s, and others have")
        elif nodes and ended:
            lost |= dict.fromkeys(late, f"could not start its agent; srun said: {self.said_by_srun()[-1000:]}")
        return lost

    def stop(self, number: signal.Signals) -> None:
        """Have every agent send its ranks a signal once, also those that have yet to start."""
        with self._changing:
            self.stopping = number
            for node in self.nodes.values():
                if node.started:
                    self._send(node, {"stop": number})

    def death(self, rank: int) -> Death:
        """Of what a rank died that has left no word."""
        answer = self.nodes[rank // self.per_node].ask(DEATH_S, death=rank)
        return Death(*answer) if answer else Death(None)

    def where(self) -> dict[int, Where]:
        """Have every rank write its stacks to its log, and say where it is. A node that does not answer is left out."""
        found: dict[int, Where] = {}
        asking = [node for node in self.nodes.values() if not node.over]
        for node in asking:
            self._send(node, {"where": True})
        deadline_s = time.monotonic() + WHERE_S
        for node in asking:
            with suppress(queue.Empty):
                answer = node.answers.get(timeout=max(0.0, deadline_s - time.monotonic()))
                found |= {rank: Where(*place) for rank, place in answer}
        return found

    def said_by_torchrun(self) -> str:
        """The log of the first torchrun that failed, or what srun has said."""
        for node in self.nodes.values():
            log = self.folder / f"torchrun-{node.host}.log"
            if any(node.look.torchruns) and log.exists():
                return log.read_text(errors="replace")
        inside = f" in image {self.image}" if self.image else ""  # srun may end before it has said why that failed
        return f"nothing{inside}; srun said:\n{self.said_by_srun()}"

    def said_by_srun(self) -> str:
        return (self.folder / _LOG).read_text(errors="replace")

    def end(self) -> list[str]:
        """Have every node end what is left there. Of one that does not answer, its agent does so by itself."""
        with self._changing:
            self.ending.set()
        nodes = [node for node in self.nodes.values() if node.heard_s > time.monotonic() - SILENT_S]
        for node in nodes:
            self._send(node, {"end": True})
        deadline_s = time.monotonic() + END_S
        while time.monotonic() < deadline_s and not all(node.over or node.heard_s < 0 for node in nodes):
            time.sleep(0.05)
        if self.listener:
            with suppress(OSError):  # closed alone, it would not wake who waits for a connection
                self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        for node in list(self.nodes.values()):
            node.link.close()
        if self.process:
            self._end_srun(self.process)
            self.showing.join(SRUN_S)
        return [words for node in self.nodes.values() for words in node.undead or []]

    def _end_srun(self, process: "subprocess.Popen[bytes]") -> None:
        """It waits for ever for a task whose slurmstepd was killed, or for a node that is down."""
        if all(node.over for node in self.nodes.values()) and _ends(process):
            return
        for step in {node.step for node in self.nodes.values()}:
            self.cancel(step)
        process.terminate()
        if not _ends(process):
            process.kill()
            process.wait()


def _ends(process: "subprocess.Popen[bytes]") -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(SRUN_S)
        return True
    return False
