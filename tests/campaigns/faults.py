"""The fault campaign: whatever befalls a run of several ranks, it is named on one page and ends as if nothing had been.

    python tests/campaigns/faults.py --processes 2 4
    python tests/campaigns/faults.py --only killed

Each fault is inflicted on real processes that wait at a known place. Afterwards no process of the command is left,
postmortem.md names the right rank and cause, and the run, started again where it did not go on by itself, ends bit for
bit as one that nobody disturbed. Prints the seconds from the fault to the first new step, and exits with 1 if anything
was not so.
"""
# ruff: noqa: E402 - a script finds what it shares with the tests only once it has said where that is

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # as a script
    sys.path.insert(0, str(ROOT))

import psutil
import torch

from tests.campaigns import starts
from tests.dist.conftest import Stage, staged
from toolkit import pulse
from toolkit.proof import NOT_OF_THE_JOB
from toolkit.run import STOP, Run

STEPS, HELD_AT = 50, 25
SCENE = """
import itertools
import os
import signal
import time
from pathlib import Path

import torch

from toolkit import optim
from toolkit.checkpoint import Checkpointer
from toolkit.datasets import digits
from toolkit.tasks import Classification

RANK = os.environ.get("RANK", "0")
whole_save = Checkpointer.save


def pause(place):
    while Path(f"hold-{place}-{RANK}").exists():
        Path(f"held-{place}-{RANK}").touch()
        if signal.getsignal(signal.SIGTERM).__self__.received:
            Path(f"told-{RANK}").touch()
        time.sleep(0.02)


def save(self, *state):
    pause("save")
    whole_save(self, *state)


calls = itertools.count()


def cosine(step, total_steps, **args):
    if next(calls) >= 3:  # before that it is tried out, when the job is built
        pause(step)
    if Path(f"plant-memory-{RANK}").exists():
        Path(f"plant-memory-{RANK}").unlink()
        torch.ones(1 << 28)
    if Path(f"plant-exit-{RANK}").exists():
        Path(f"plant-exit-{RANK}").unlink()
        os._exit(3)
    if Path(f"plant-error-{RANK}").exists():
        Path(f"plant-error-{RANK}").unlink()
        raise ValueError("torn in two")
    return optim.cosine(step, total_steps, **args)


class Digits(digits.Digits):
    def gather(self, indices):
        if Path("plant-sample").exists() and int(Path("plant-sample").read_text()) in indices:
            raise ValueError("torn in two")
        inputs, targets = super().gather(indices)
        if Path("plant-nan").exists():
            inputs[torch.from_numpy(indices == int(Path("plant-nan").read_text()))] = float("nan")
        return inputs, targets


class Task(Classification):
    def metrics(self, output, target):
        pause("evaluation")
        return super().metrics(output, target)


Checkpointer.save = save
pause("start")
"""
JOB = f"""
task: scene:Task
data:
  train: {{name: scene:Digits}}
  val:   {{name: digits, args: {{split: test}}}}
  global_batch_size: 32
  workers: 1
model:      {{name: mlp, args: {{hidden: [32], dropout: 0.1}}}}
optimizer:  {{name: adamw, args: {{lr: 3e-3}}}}
schedule:   {{name: scene:cosine, args: {{warmup_steps: 5}}}}
train:      {{max_steps: {STEPS}, clip_grad_norm: 1.0}}
eval:       {{every_steps: 15}}
checkpoint: {{every_steps: 10, every_min: null}}
log:        {{every_steps: 1}}
"""
END_S, ENDS_S = 100.0, 30.0  # a whole run; from a fault to the end of everything that it ends


class Scene:
    """A run of several ranks that wait, and what can be done to them."""

    def __init__(self, stage: Stage, processes: int, extra: tuple[str, ...], afterwards: contextlib.ExitStack) -> None:
        stage.place.write("scene.py", SCENE)
        stage.place.write("job.yaml", JOB)
        self.stage, self.folder, self.run = stage, stage.folder, Run(str(stage.folder / "runs/job"))
        self.afterwards = afterwards  # what is to be done when nobody is left
        self.processes, self.words = processes, ["train", "job.yaml", f"--processes={processes}", *extra]

    def hold(self, place: str) -> None:
        self.process: Any = self.stage.hold(*self.words, before=place, ranks=range(self.processes))  # type: ignore[arg-type]
        self.notes = self.stage.notes()
        (self.attempt,) = self.attempts()

    def attempts(self) -> set[Path]:
        return set(self.stage.tmp.glob("toolkit-attempt-*"))

    def rank(self, rank: int) -> psutil.Process:
        return psutil.Process(self.notes[rank]["pid"])

    def torchrun(self) -> psutil.Process:
        (torchrun,) = psutil.Process(self.process.pid).children()
        return torchrun

    def plant(self, what: str, text: str = "") -> None:
        (self.folder / f"plant-{what}").write_text(text)

    def wait_for_a_step(self, process: Any) -> float:
        """The time at which an attempt after the one that was held has taken its first step."""
        fresh = self.stage.wait_for(lambda: self.attempts() - {self.attempt}, "another attempt", process)
        begun = self.run.newest_checkpoint() or 0
        path = str(fresh.pop() / "rank-0.pulse")

        def stepped() -> bool:
            beat = pulse.read(path)
            return beat is not None and beat.phase != "start" and beat.step > begun

        self.stage.wait_for(stepped, "step", process)
        return time.monotonic()

    def wait_for_an_event(self, process: Any) -> dict[str, Any]:
        """The first event in the run's metrics, which the first line after a skip or a rollback has."""
        metrics = self.folder / "runs/job/metrics.jsonl"
        self.stage.wait_for(lambda: '"events"' in metrics.read_text(), "event", process)
        found = [event for line in self.stage.place.metrics("runs/job") for event in line.get("events", [])]
        return dict(found[0])


Inflict = Callable[[Scene], None]


@dataclass(frozen=True)
class Fault:
    """Something that befalls a run whose ranks all wait `at` some place, and what must come of it."""

    name: str
    inflict: Inflict
    before: Inflict = lambda scene: None  # what is done before the run starts
    page: str | None = None  # a pattern that postmortem.md must have; None: nothing has failed
    status: int = 0  # of the command; if it is not 0, the same command is typed again
    said: str = ""  # a pattern in what the command says
    at: str = str(HELD_AT)
    extra: tuple[str, ...] = ()
    stacks: bool = False  # whether logs/ must hold the stacks of all ranks
    event: str = ""  # what the metrics call it, if the ranks go on without another attempt
    silent: bool = False  # whether nobody is left to write the page but the next start

    @property
    def ends_s(self) -> float:
        """How long the command may take to end: where it makes another start in between, as long as a whole run."""
        return END_S if self.status == 0 or "started again" in self.said else ENDS_S


def _kill(find: Callable[[Scene], psutil.Process]) -> Inflict:
    return lambda scene: find(scene).kill()


def _stop(scene: Scene) -> None:
    """Of what is let go before the signal has come to the ranks, all may be done before they ask each other again."""
    scene.process.send_signal(signal.SIGTERM)
    scene.stage.wait_until_told(range(scene.processes), scene.process)


def _request(scene: Scene) -> None:
    """A stop request is read at the lock's heartbeat, which writes status.json just before."""
    status = scene.folder / "runs/job/status.json"
    scene.run.ask(STOP)
    for _ in range(2):
        before = status.stat().st_mtime_ns
        scene.stage.wait_for(lambda before=before: status.stat().st_mtime_ns != before, "heartbeat")


def _interrupt_twice(scene: Scene) -> None:
    deadline_s = time.monotonic() + ENDS_S
    while scene.process.poll() is None and time.monotonic() < deadline_s:
        scene.process.send_signal(signal.SIGINT)
        with contextlib.suppress(Exception):
            scene.process.wait(0.2)


def _little_room(scene: Scene) -> None:
    """As under `ulimit -v`: rank 1 may take a little more than it has, and wants a GiB."""
    scene.rank(1).rlimit(psutil.RLIMIT_AS, (scene.rank(1).memory_info().vms + (1 << 28), -1))
    scene.plant("memory-1")


def _little_room_in_a_cgroup(scene: Scene) -> None:
    group = memory_cgroup()
    scene.afterwards.callback(group.rmdir)
    (group / "cgroup.procs").write_text(str(scene.notes[1]["pid"]))
    scene.plant("memory-1")


def memory_cgroup() -> Path:
    """A cgroup for rank 1 with room for 256 MiB and no swap. Raises OSError where none can be made."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup" if v2 else "/sys/fs/cgroup/memory", f"toolkit-faults-{os.getpid()}")
    group.mkdir(exist_ok=True)
    (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(1 << 28))
    swap = group / ("memory.swap.max" if v2 else "memory.memsw.limit_in_bytes")  # in v1 that of both together
    if swap.exists():  # where the kernel accounts for it
        swap.write_text("0" if v2 else str(1 << 28))
    return group


def _plant_sample(what: str) -> Inflict:
    """Something is wrong with a sample that is first wanted in the step after 35 are done, by rank 1."""

    def plant(scene: Scene) -> None:
        from toolkit.datasets.sampler import ElasticDistributedSampler

        share = ElasticDistributedSampler(range(1438), scene.processes, 1, seed=0, global_batch_size=32)
        scene.plant(what, str(int(share.share(35)[1][3])))

    return plant


def _go_on(scene: Scene) -> None:
    """What was done before is enough."""


FAULTS = [
    Fault("rank 0 killed", _kill(lambda scene: scene.rank(0)), page=r"\*\*rank 0 \(pid \d+\) was killed by SIGKILL"),
    Fault("rank 1 killed", _kill(lambda scene: scene.rank(1)), page=r"\*\*rank 1 \(pid \d+\) was killed by SIGKILL"),
    Fault("loader worker killed", _kill(lambda scene: scene.rank(1).children()[0]),
          page=r"\*\*rank 1: a loader worker \(pid \d+\) was killed by SIGKILL"),
    Fault("torchrun killed", _kill(Scene.torchrun), page=r"\*\*torchrun \(pid \d+\) was killed by SIGKILL"),
    Fault("supervisor killed", _kill(lambda scene: psutil.Process(scene.process.pid)),
          page="ended without a word", status=-signal.SIGKILL, silent=True),
    Fault("rank 1 stopped", lambda scene: scene.rank(1).suspend(),
          page=r"\*\*rank 1 gave no sign of life for \d+\.\d s in phase step, whose limit is 6 s: it is stopped, at ",
          extra=("launch.limits.step_s=6",), stacks=True),
    Fault("exception on rank 1", lambda scene: scene.plant("error-1"), page=r"\*\*rank 1: ValueError: torn in two"),
    Fault("os._exit of rank 1", lambda scene: scene.plant("exit-1"),
          page=r"\*\*rank 1 \(pid \d+\) ended with exit status 3 and without a word"),
    Fault("memory limit of rank 1", _little_room, page=r"\*\*rank 1: out of memory in step 26: "),
    Fault("memory cgroup of rank 1", _little_room_in_a_cgroup,
          page=r"\*\*rank 1 \(pid \d+\) was killed by the kernel: out of memory"),
    Fault("sample that always crashes", _plant_sample("sample"), page=r"\*\*rank 1: .*sample \d+ .*torn in two",
          status=1, said="not started again: the same failure has come back", extra=("launch.max_restarts=2",)),
    Fault("NaN on rank 1, stop", _go_on, _plant_sample("nan"), r"\*\*rank 1: rank 1's loss is nan in step 36 ",
          status=1, said="not started again: the same failure has come back", at="35"),
    Fault("NaN on rank 1, skip", _go_on, _plant_sample("nan"), said="rank 1's loss is nan in step 36: skipped",
          at="35", extra=("train.on_nan=skip",), event="skip"),
    Fault("NaN on rank 1, rollback", _go_on, _plant_sample("nan"), said="rolled back to step 30", at="35",
          extra=("train.on_nan=rollback",), event="rollback"),
    Fault("SIGTERM in a step", _stop, status=75, said="the same command goes on"),
    Fault("SIGTERM in an evaluation", _stop, status=75, said="the same command goes on", at="evaluation"),
    Fault("SIGTERM in a save", _stop, status=75, said="the same command goes on", at="save"),
    Fault("SIGTERM in the start", _stop, status=75, said="the same command goes on", at="start"),
    Fault("stop request in the run", _request, status=75, said="the same command goes on"),
    Fault("second Ctrl-C in a save", _interrupt_twice, page="a second Ctrl-C", status=1, said="left at once",
          at="save", silent=True),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: every tensor of its last checkpoint, and its metrics without what is measured."""

    tensors: dict[str, torch.Tensor]
    metrics: list[dict[str, Any]]

    @classmethod
    def of(cls, scene: Scene) -> "Outcome":
        lines = scene.stage.place.metrics("runs/job")
        told = [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in lines]
        return cls(scene.stage.place.tensors("runs/job", STEPS), told)

    def same(self, other: "Outcome") -> bool:
        names = self.tensors.keys()
        equal = names == other.tensors.keys() and all(torch.equal(self.tensors[n], other.tensors[n]) for n in names)
        return equal and self.metrics == other.metrics


@contextlib.contextmanager
def scene_in(folder: Path, processes: int, extra: tuple[str, ...] = ()) -> Iterator[Scene]:
    """A scene on which nobody is left at the end."""
    folder.mkdir()
    with contextlib.ExitStack() as afterwards, staged(starts.Forked(folder)) as stage:
        yield Scene(stage, processes, extra, afterwards)


def undisturbed(folder: Path, processes: int) -> Outcome:
    """What the run comes to if nothing happens to it."""
    with scene_in(folder, processes) as scene:
        scene.stage.run(*scene.words, timeout_s=END_S)
        return Outcome.of(scene)


def suffer(fault: Fault, folder: Path, processes: int, expected: Outcome) -> float:
    """Inflict it, and check all that must hold afterwards. Returns the seconds until the first new step."""
    with scene_in(folder, processes, fault.extra) as scene:
        fault.before(scene)
        scene.hold(fault.at)
        start_s = time.monotonic()
        fault.inflict(scene)
        scene.stage.release()
        process, took_s = scene.process, 0.0
        if fault.event:
            event = scene.wait_for_an_event(process)
            took_s = time.monotonic() - start_s
            assert (event["event"], event["step"], event["rank"]) == (fault.event, 36, 1), event
            assert event["positions"] == [35 * 32, 36 * 32 - 1], event
        elif fault.status == 0:
            took_s = scene.wait_for_a_step(process) - start_s
        out, err = scene.stage.end(process, fault.status, fault.ends_s)
        assert "Traceback" not in out + err, out + err
        assert re.search(fault.said, out + err), f"{fault.said!r} is not in {out + err}"
        scene.stage.wait_for(lambda: not scene.stage.alive(), "end of every process", timeout_s=ENDS_S)
        if not fault.silent:
            _check_page(fault, scene)
        if fault.status:
            for planted in scene.folder.glob("plant-*"):
                planted.unlink()
            again = scene.stage.start(*scene.words)
            took_s = scene.wait_for_a_step(again) - start_s
            scene.stage.end(again, 0, END_S)
        if fault.silent:
            _check_page(fault, scene)
        status = scene.stage.place.status("runs/job")
        assert (status["state"], status["exit"], status["step"]) == ("completed", 0, STEPS), status
        assert not [*scene.stage.tmp.glob("toolkit-*")], "folders of attempts"
        if not fault.event:  # it has left something out; see tests/dist/test_nan.py
            assert Outcome.of(scene).same(expected), "it did not end as an undisturbed run"
        return took_s


def _check_page(fault: Fault, scene: Scene) -> None:
    page = scene.folder / "runs/job/postmortem.md"
    if fault.page is None:
        assert not page.exists(), page.read_text()
        return
    text = page.read_text()
    assert re.search(fault.page, text), text
    assert "What to do: " in text
    assert ("Last heartbeats:" in text) != fault.silent
    if fault.stacks:
        for rank in range(scene.processes):
            stacks = (scene.folder / f"runs/job/logs/attempt-1-rank-{rank}-stacks.log").read_text()
            assert "most recent call first" in stacks, stacks


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="ranks of the run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a fault's name")
    given = parser.parse_args()
    starts.warm()
    failed = 0
    for processes in given.processes:
        with tempfile.TemporaryDirectory(prefix="toolkit-faults-") as folder:
            expected = undisturbed(Path(folder, "undisturbed"), processes)
            for number in range(given.rounds):
                for fault in FAULTS:
                    if given.only in fault.name:
                        failed += not _told(fault, Path(folder, f"{fault.name}-{number}"), processes, expected)
    return min(failed, 1)


def _told(fault: Fault, folder: Path, processes: int, expected: Outcome) -> bool:
    """Whether a fault is survived; says so in one line."""
    try:
        took_s = suffer(fault, folder, processes, expected)
    except Exception:
        print(f"{processes} ranks, {fault.name}: FAILED\n{traceback.format_exc()}", flush=True)
        return False
    print(f"{processes} ranks, {fault.name}: first new step after {took_s:.1f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
