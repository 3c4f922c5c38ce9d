"""The kill campaign: training is killed with SIGKILL at random moments, half of them in the middle of a save.

    python tests/campaigns/kill.py --rounds 200 --store local
    python tests/campaigns/kill.py --rounds 50 --store s3 --seed 7

After every kill, what a resume would load is read byte for byte; it must not be older than the last checkpoint that had
been committed. Every run, killed several times, must end bit for bit as one that nobody disturbed. Prints one line, and
exits with 1 if anything was not so.
"""
# ruff: noqa: E402 - a script finds what it shares with the tests only once it has said where that is

import argparse
import contextlib
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # as a script
    sys.path.insert(0, str(ROOT))

import torch

from tests.campaigns import starts
from tests.conftest import tensors_of
from tests.store.servers import S3Server, used
from toolkit import storage
from toolkit.checkpoint import Archive
from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.manifest import DamagedError
from toolkit.proof import NOT_OF_THE_JOB
from toolkit.run import Run

SAVE_EVERY = 4
LATEST = 2 * SAVE_EVERY  # steps that a kill may cost: those since a save, while the one after it is written
END_S = 120.0
JOB = f"""
task: classification
data:
  train: {{name: digits}}
  val:   {{fraction: 0.1}}
  test:  {{name: digits, args: {{split: test}}}}
  transforms: [{{name: crop, args: {{padding: 1}}}}]
  global_batch_size: 16
model:     {{name: mlp, args: {{hidden: [48, 32], dropout: 0.1}}}}
optimizer: {{name: adamw, args: {{lr: 3e-3}}}}
schedule:  {{name: cosine, args: {{warmup_steps: 5}}}}
train:     {{clip_grad_norm: 1.0, ema_decay: 0.9}}
eval:      {{every_steps: 50}}
checkpoint:
  {{every_steps: {SAVE_EVERY}, every_min: null, keep: 2, keep_every: 40, best: {{metric: val/loss, mode: min}}}}
log:       {{every_steps: 3}}
"""
STEPS = {"local": 300, "s3": 100}
KILLS_A_RUN = (6, 12)
BEGUN, COMMITTED, TIDIED, STEPPED = b"b", b"c", b"t", b"s"
EVENT = struct.Struct("=cq")


@dataclass
class Tally:
    """What has happened so far."""

    store: str
    kills: int = 0
    in_saves: int = 0
    worst_loss: int = 0
    runs: int = 0
    equal: int = 0
    violations: list[str] = field(default_factory=list)
    took_s: float = 0.0

    def line(self) -> str:
        return (
            f"{self.store}: {self.kills} kills, {self.in_saves} in saves, worst loss {self.worst_loss} steps "
            f"(a save every {SAVE_EVERY}), {self.equal} of {self.runs} runs equal, {len(self.violations)} violations, "
            f"{self.took_s:.0f} s"
        )


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the start; or in the `save`th save, so far into it; or so far into what
    comes after its commit, when old checkpoints are removed.
    """

    seconds: float = 0.0
    save: int = 0
    share: float = 0.0
    after: bytes = BEGUN


@dataclass
class Life:
    """One start of the run, to its end."""

    status: int | None = None  # None: it was killed
    first: int = -1  # the first step that it took
    step: int = -1  # the last
    begun: int = -1  # the last save that had its snapshot
    committed: int = -1  # the last that was a checkpoint
    took_s: dict[bytes, list[float]] = field(default_factory=lambda: {BEGUN: [], COMMITTED: []})
    said: str = ""
    now: bytes = TIDIED  # the last event of a save
    now_s: float = 0.0
    counts: Counter[bytes] = field(default_factory=Counter)

    @property
    def in_save(self) -> bool:
        return self.begun > self.committed

    def take(self, kind: bytes, number: int) -> None:
        """Something has happened."""
        if kind == STEPPED:
            self.first, self.step = self.first if self.step > 0 else number, number
            return
        now_s = time.monotonic()
        if self.now in self.took_s:
            self.took_s[self.now].append(now_s - self.now_s)
        self.now, self.now_s = kind, now_s
        self.counts[kind] += 1
        self.begun = number if kind == BEGUN else self.begun
        self.committed = number if kind == COMMITTED else self.committed


def tell(connection: Connection) -> None:
    """In the process that trains: say through a pipe what has been done, in the moment in which it has."""
    from toolkit.checkpoint import Checkpointer
    from toolkit.trainer import Trainer

    save, commit, step = Checkpointer._save, Checkpointer._commit, Trainer.step

    def event(kind: bytes, number: int) -> None:
        os.write(connection.fileno(), EVENT.pack(kind, number))

    def told_save(self: Any, number: int, *what: Any) -> None:
        event(BEGUN, number)
        save(self, number, *what)
        event(TIDIED, number)

    def told_commit(self: Any, folder: str, manifest: Any, *what: Any) -> None:
        commit(self, folder, manifest, *what)
        event(COMMITTED, manifest.step)

    def told_step(self: Any, batches: Any) -> None:
        step(self, batches)
        event(STEPPED, self.state.step)

    Checkpointer._save, Checkpointer._commit, Trainer.step = told_save, told_commit, told_step


def live(
    words: tuple[str, ...],
    folder: Path,
    environment: Mapping[str, str],
    moment: Moment | None = None,
    usual_s: Mapping[bytes, float] | None = None,
) -> Life:
    """Start the run, kill it at a moment, and tell what it did; without a moment it lives to its end.

    `usual_s` says how long it usually takes from one event of a save to the next.
    """
    life, pending = Life(), b""
    out, into = Pipe(duplex=False)
    process = starts.Started(words, folder, environment, tell, (into,))
    into.close()
    started_s = time.monotonic()
    kill_s = started_s + (moment.seconds if moment and not moment.save else END_S)
    try:
        while select.select([out], [], [], max(0.0, kill_s - time.monotonic()))[0]:
            chunk = os.read(out.fileno(), 1 << 16)
            if not chunk:
                life.status = process.wait(END_S)
                break
            pending = _taken(life, pending + chunk)
            if moment and moment.save and usual_s and life.counts[moment.after] >= moment.save:
                late = life.counts[moment.after] - moment.save  # whoever came too late comes sooner next time
                delay_s = moment.share * usual_s[moment.after] / (1 + late)
                kill_s = life.now_s + delay_s if life.now == moment.after else started_s + END_S
        else:
            process.kill()
            while chunk := os.read(out.fileno(), 1 << 16):  # what was on its way
                pending = _taken(life, pending + chunk)
    finally:
        process.kill()
        process.wait(END_S)
        out.close()
    life.said = "".join(process.said())
    return life


def _taken(life: Life, content: bytes) -> bytes:
    """Take all whole events; returns the rest."""
    whole = len(content) // EVENT.size * EVENT.size
    for kind, number in EVENT.iter_unpack(content[:whole]):
        life.take(kind, number)
    return content[whole:]


def resumable(url: str) -> tuple[int, list[str]]:
    """(the step that a resume would load, or -1; what is wrong with any checkpoint there is)."""
    archive, wrong, newest = Archive(f"{url}/checkpoints"), [], -1
    for step in reversed(archive.folders()):
        try:
            manifest = manifests.read(archive.folder(step), step)
            if manifest and newest < 0:
                newest = archive.verify(step).step
        except DamagedError as error:
            wrong.append(str(error))
    return newest, wrong


def outcome(url: str) -> dict[str, Any]:
    """All that a run ends with, as far as it is a function of the job."""
    archive = Archive(f"{url}/checkpoints")
    last = archive.find("last")
    lines = [
        {key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in Run(url).metrics.read()
    ]
    return {
        "tensors": tensors_of(url, last),
        "values": archive.values(archive.whole(last)),
        "metrics": lines,
        "checkpoints": archive.scores(),
        "all that is there": archive.folders(),
        "damaged": archive.aside(),
        "state": (Run(url).status() or {}).get("state"),
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    wrong = [key for key in expected if key != "tensors" and expected[key] != found[key]]
    before, after = expected["tensors"], found["tensors"]
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return wrong if same else [*wrong, "tensors"]


class Campaign:
    """Runs in `place`, a folder or a URL, killed until there have been `rounds` kills."""

    def __init__(
        self,
        store: str,
        place: str,
        folder: Path,
        environment: Mapping[str, str],
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.place, self.folder, self.environment, self.say = place, folder, environment, say
        self.tally, self.chance = Tally(store), random.Random(seed)
        (folder / "job.yaml").write_text(JOB)
        self.words = ("train", "job.yaml", f"train.max_steps={STEPS[store]}")
        self.took_s = {BEGUN: [0.02], COMMITTED: [0.01]}

    def run(self, rounds: int) -> Tally:
        started_s, tally = time.monotonic(), self.tally
        live(("schema",), self.folder, {})  # from now on starts are quick
        whole = self._url("undisturbed")
        begun_s = time.monotonic()
        life = self._lived(whole, None)
        if life.status != 0:
            raise RuntimeError(life.said)
        self.life_s = time.monotonic() - begun_s
        expected = outcome(whole)
        if len(expected["checkpoints"]) < 3 or not expected["metrics"]:
            tally.violations.append(f"the undisturbed run is not what was meant: {expected['checkpoints']}")
        while tally.kills < rounds:
            url = self._url(f"run-{tally.runs}")
            self._disturb(url, min(self.chance.randint(*KILLS_A_RUN), rounds - tally.kills))
            tally.runs += 1
            life = self._lived(url, None)
            if life.status != 0:
                self._violation(f"{url} ended with exit status {life.status}: {life.said}")
            elif wrong := differences(expected, outcome(url)):
                self._violation(f"{url} ended with other {', '.join(wrong)}")
            else:
                tally.equal += 1
                storage.remove(url)
        tally.took_s = time.monotonic() - started_s
        return tally

    def _url(self, name: str) -> str:
        return storage.join(self.place, name)

    def _disturb(self, url: str, kills: int) -> None:
        """Start and kill a run so often, or until it comes to its end."""
        tally, before = self.tally, -1
        for _ in range(kills):
            life = self._lived(url, self._moment())
            if life.status is not None:
                if life.status:
                    self._violation(f"{url} ended with exit status {life.status}: {life.said}")
                return
            tally.kills, tally.in_saves = tally.kills + 1, tally.in_saves + life.in_save
            committed = max(before, life.committed)
            if life.first >= 0 and life.first != max(before, 0) + 1:
                self._violation(
                    f"{url}, after kill {tally.kills - 1}: went on from {life.first - 1}, not from {before}"
                )
            newest, wrong = resumable(url)
            for words in wrong:
                self._violation(f"{url}, kill {tally.kills}: {words}")
            if newest < committed:
                self._violation(f"{url}, kill {tally.kills}: step {committed} was committed, {newest} is the newest")
            loss = max(0, life.step - max(newest, 0))
            tally.worst_loss = max(tally.worst_loss, loss)
            if loss > LATEST:
                self._violation(f"{url}, kill {tally.kills}: {loss} steps are lost, from {newest} to {life.step}")
            before = newest

    def _lived(self, url: str, moment: Moment | None) -> Life:
        usual_s = {kind: sorted(took_s)[len(took_s) // 2] for kind, took_s in self.took_s.items()}
        life = live((*self.words, f"run.dir={url}"), self.folder, self.environment, moment, usual_s)
        for kind, took_s in life.took_s.items():
            self.took_s[kind] = [*self.took_s[kind], *took_s][-50:]
        return life

    def _moment(self) -> Moment:
        """Half of all kills are in saves, a quarter right after one, and a quarter comes whenever, also before the
        first step.
        """
        save, share = self.chance.randint(1, 10), self.chance.random()
        if 2 * self.tally.in_saves <= self.tally.kills:
            return Moment(save=save, share=share)
        if self.chance.random() < 0.5:
            return Moment(save=save, share=share, after=COMMITTED)
        return Moment(seconds=self.chance.uniform(0.0, 0.6 * self.life_s))

    def _violation(self, words: str) -> None:
        self.tally.violations.append(words)
        self.say(f"VIOLATION: {words}")


def campaign(store: str, rounds: int, seed: int, folder: Path, say: Callable[[str], None] = print) -> Tally:
    """The whole of it on `local` disk or on `s3`; raises MissingError where this machine has no S3 server."""
    with contextlib.ExitStack() as stack:
        place, environment = str(folder / "runs"), dict[str, str]()
        server = S3Server(folder / "s3") if store == "s3" else None
        if server:
            stack.enter_context(server)
            stack.enter_context(used(server.environment))
            place, environment = server.fresh_url(), server.environment
        starts.warm()
        tally = Campaign(store, place, folder, environment, seed, say).run(rounds)
        if server and (uploads := server.uploads()):
            tally.violations.append(f"unfinished uploads: {uploads}")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="how many kills")
    parser.add_argument("--store", choices=sorted(STEPS), default="local")
    parser.add_argument("--seed", type=int, default=0, help="decides when they come")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="toolkit-kill-"))
    tally = campaign(given.store, given.rounds, given.seed, folder)
    print(tally.line())
    if tally.violations:
        print(f"the runs that went wrong are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
