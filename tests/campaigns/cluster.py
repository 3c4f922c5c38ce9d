"""The fault campaign on a real Slurm: whatever befalls a job, it ends as if nothing had been, with nothing typed.

    make slurm-up; python tests/campaigns/cluster.py [--only preempted]

Each fault is inflicted on ranks of two nodes that wait at a known step. Afterwards the job has completed, the run is
bit for bit one that nobody disturbed, and what was lost is at most the step in hand where there was a warning, at most
the steps since the last checkpoint where there was none. Prints the seconds from the fault to the first new step, and
exits with 1 if anything was not so.
"""
# ruff: noqa: E402 - a script finds what it shares with the tests only once it has said where that is

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # as a script
    sys.path.insert(0, str(ROOT))

import torch

from tests.campaigns.faults import Outcome
from tests.conftest import tensors_of
from tests.dist import conftest as dist
from tests.store import servers
from toolkit import storage
from toolkit.cluster import slurm
from toolkit.proof import NOT_OF_THE_JOB, taken
from toolkit.run import Run

STEPS, HELD_AT = 50, 25
# Ranks can be held before a step; rank 0 notes each that it begins.
HELD = dist.HELD.replace(
    "    return",
    """    if rank == "0":
        with open("taken", "a") as file:
            file.write(f"{os.uname().nodename}:{os.getpid()} {step}\\n")
    return""",
)
JOB = f"""
task: classification
data:
  train: {{name: digits}}
  val:   {{name: digits, args: {{split: test}}}}
  global_batch_size: 32
model:      {{name: mlp, args: {{hidden: [32], dropout: 0.1}}}}
optimizer:  {{name: adamw, args: {{lr: 3e-3}}}}
schedule:   {{name: held:cosine, args: {{warmup_steps: 5}}}}
train:      {{max_steps: {STEPS}, clip_grad_norm: 1.0}}
eval:       {{every_steps: 15}}
checkpoint: {{every_steps: 10, every_min: null, keep: 10}}
log:        {{every_steps: 1}}
"""
END_S, STEP_S = 180.0, 120.0
HEAD = "10.77.0.1"  # of the test bed's own network, on which the nodes are, too
BED = ROOT / "slurm/testbed/cluster"
PROFILE = ROOT / "slurm/testbed.yaml"


def bed(*words: str, timeout_s: float = 60) -> str:
    """What a command of the test bed says."""
    done = subprocess.run([str(BED), *words], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Scene:
    """A run that is submitted to the test bed, whose ranks wait before a step, and what can be done to it."""

    def __init__(self, folder: Path, nodes: str = "2", changes: tuple[str, ...] = (), run: str = "") -> None:
        folder.mkdir()
        (folder / "held.py").write_text(HELD)
        (folder / "job.yaml").write_text(JOB)
        self.folder, self.nodes, self.changes = folder, nodes, changes
        self.url = run or str(folder / "runs/job")
        self.run = Run(self.url)
        self.profile = folder / "cluster.yaml"
        self.profile.write_text(PROFILE.read_text() + (f"scratch: {folder}/scratch\n" if run else ""))
        self.job_id = ""
        self.released_s = 0.0

    def toolkit(self, *words: str, status: int = 0, timeout_s: float = END_S) -> str:
        """`toolkit WORDS` as a user types it; what it says."""
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "toolkit", *words], cwd=self.folder, env=os.environ | ours,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *options: str) -> None:
        words = ["submit", "job.yaml", f"run.dir={self.url}", *self.changes]
        self.toolkit(*words, "--cluster", str(self.profile), "--nodes", self.nodes, *options)
        self.job_id = json.loads(storage.read(self.run.at("submitted.json")))["job_id"]

    def hold(self, step: int = HELD_AT, ranks: int = 4) -> None:
        """Have all ranks wait before a step; see `release`."""
        for rank in range(ranks):
            (self.folder / f"hold-{step}-{rank}").touch()

    def wait_until_held(self, step: int = HELD_AT, ranks: int = 4) -> None:
        names = [f"held-{step}-{rank}" for rank in range(ranks)]
        self.wait_for(lambda: all((self.folder / name).exists() for name in names), f"ranks before step {step}", STEP_S)

    def release(self) -> None:
        for path in self.folder.glob("hold-*"):
            path.unlink()

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
        deadline_s = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline_s, f"no {what} within {timeout_s:.0f} s\n{self.said()}"
            time.sleep(0.1)
        return value

    def starts(self) -> list[list[int]]:
        """The steps that each start of rank 0 has begun, counted from 0, one start after the other.

        The first three calls of a start's schedule are none: it is tried out when the job is built.
        """
        path, found = self.folder / "taken", dict[str, list[int]]()
        for line in path.read_text().splitlines() if path.exists() else []:
            who, step = line.split()
            found.setdefault(who, []).append(int(step))
        return [steps for _, _, _, *steps in found.values() if steps]

    def wait_for_the_end(self) -> None:
        def ended() -> bool:
            status = self.run.status() or {}
            assert status.get("state") != "failed" or self.in_queue(), f"failed: {status}\n{self.said()}"
            return status.get("state") == "completed" and not self.in_queue()

        self.wait_for(ended, "completed run", END_S)

    def in_queue(self) -> bool:
        facts = slurm.job_facts(self.job_id, patience_s=30)
        return facts is not None and facts.state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")

    def hosts(self) -> list[str]:
        facts = slurm.job_facts(self.job_id, patience_s=30)
        assert facts
        return list(facts.nodes)

    def pids(self, *parts: str) -> list[int]:
        """Processes of this run whose command line has all these parts: all nodes are on this machine."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (path.parent / "environ").read_bytes()
                if all(part in line for part in parts) and f"SLURM_JOB_ID={self.job_id}\0".encode() in environment:
                    found.append(int(path.parent.name))
        return sorted(found)

    def rank(self, rank: int) -> int:
        """The pid of a rank."""
        return next(pid for pid in self.pids("-m toolkit train") if _environment(pid).get("RANK") == str(rank))

    def said(self) -> str:
        logs = [*self.folder.glob("runs/*/slurm/*/*.out"), *self.folder.glob("scratch/*/*/*.out")]
        return "\n".join(path.read_text(errors="replace")[-6000:] for path in logs)

    def tensors(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.url, STEPS)

    def told(self) -> list[dict[str, Any]]:
        """The metrics, without what is measured."""
        lines = [json.loads(line) for line in storage.read(self.run.at("metrics.jsonl")).decode().splitlines()]
        return [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in lines]


def _environment(pid: int) -> Mapping[str, str]:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(item.split("=", 1) for item in content.split("\0") if "=" in item)


Inflict = Callable[[Scene], None]


@dataclass(frozen=True)
class Fault:
    """Something that befalls a job whose ranks all wait before step HELD_AT."""

    name: str
    inflict: Inflict
    warned: bool = False  # whether the run could save before: then no step is lost
    options: tuple[str, ...] = ()
    after: Inflict = lambda scene: None  # mends what was broken
    said: str = ""  # a pattern that the job's log must have
    page: str = ""  # and one for postmortem.md
    goes_on: bool = False  # whether the ranks are to notice nothing at all
    remote: bool = False  # whether the run is on an S3 server


def _kill(*parts: str, last: bool = False) -> Inflict:
    return lambda scene: os.kill(scene.pids(*parts)[-1 if last else 0], signal.SIGKILL)


def _preempt(scene: Scene) -> None:
    """Somebody more urgent wants the nodes, for a moment."""
    answer = slurm.ask(
        "sbatch", "--partition=urgent", f"--nodelist={','.join(scene.hosts())}", "--nodes=2", "--exclusive", "--time=2",
        f"--output={scene.folder}/urgent.out", "--wrap=true",
    )  # fmt: skip
    assert "Submitted" in answer


def _last_host(scene: Scene) -> str:
    return scene.hosts()[-1].removeprefix("n")


def _slurmstepd(scene: Scene) -> None:
    """kill -9 of the slurmstepd of the step on its second node: the parent of the agent there."""
    agents = [pid for pid in scene.pids("toolkit.cluster.agent") if _environment(pid).get("SLURM_NODEID") == "1"]
    tasks = [pid for pid in agents if "srun" not in Path(f"/proc/{pid}/cmdline").read_text()]
    status = Path(f"/proc/{tasks[0]}/status").read_text()
    os.kill(int(re.search(r"^PPid:\s+(\d+)$", status, re.MULTILINE)[1]), signal.SIGKILL)  # type: ignore[index]


def _batch_slurmstepd(scene: Scene) -> None:
    """That of the batch step: the parent of the guard."""
    guard = scene.pids("submitit.core._submit")[0]
    status = Path(f"/proc/{guard}/status").read_text()
    os.kill(int(re.search(r"^PPid:\s+(\d+)$", status, re.MULTILINE)[1]), signal.SIGKILL)  # type: ignore[index]


def _net_cut(scene: Scene) -> None:
    bed("net-cut", _last_host(scene))


def _net_join(scene: Scene) -> None:
    for number in range(1, 5):
        bed("net-join", str(number))


def _node_kill(scene: Scene) -> None:
    bed("node-kill", _last_host(scene))


def _nodes_boot(scene: Scene) -> None:
    for number in range(1, 5):
        bed("node-boot", str(number))


def _slurmctld(scene: Scene) -> None:
    bed("slurmctld-kill")
    bed("slurmctld-start")


def _suspend(scene: Scene) -> None:
    """As a gang scheduler does: for longer than anybody may be silent."""
    slurm.ask("scontrol", "suspend", scene.job_id)
    time.sleep(30)
    slurm.ask("scontrol", "resume", scene.job_id)
    time.sleep(20)  # then a node that is thought to be lost has been missed


def _twice(scene: Scene) -> None:
    """Something is wrong with a node: a rank of it is killed, and again."""
    os.kill(scene.rank(3), signal.SIGKILL)
    for path in scene.folder.glob("held-*"):
        path.unlink()
    scene.wait_until_held()
    os.kill(scene.rank(3), signal.SIGKILL)


def _kill_while_stopping(scene: Scene) -> None:
    """Somebody asks the job to end, and before all is saved a rank dies."""
    slurm.ask("scancel", "--signal=TERM", "--batch", scene.job_id)
    scene.wait_for(lambda: "told to stop" in scene.said(), "warning", STEP_S)
    os.kill(scene.rank(1), signal.SIGKILL)


FAULTS = [
    Fault("time limit", lambda scene: None, warned=True, options=("--time", "1"), said="is queued again"),
    Fault("preempted by urgent", _preempt, warned=True, said="is queued again"),
    Fault("scontrol requeue", lambda scene: str(slurm.ask("scontrol", "requeue", scene.job_id)) and None),
    Fault("rank 1 killed", lambda scene: os.kill(scene.rank(1), signal.SIGKILL), page=r"rank 1 \(pid \d+\) was killed"),
    Fault("rank 3 killed", lambda scene: os.kill(scene.rank(3), signal.SIGKILL), page=r"rank 3 \(pid \d+\) was killed"),
    Fault("rank 1 killed while told to stop", _kill_while_stopping, said="is queued again"),
    Fault("rank 3 killed, and again", _twice, said=r"without node n\d, which has failed twice"),
    Fault("torchrun killed", _kill("torch.distributed.run", last=True), page=r"torchrun \(pid \d+\) was killed"),
    Fault("supervisor killed", _kill("-m toolkit supervise"), said="the supervisor was killed by SIGKILL"),
    Fault("slurmstepd killed", _slurmstepd, page="node n. has lost its agent"),
    Fault("slurmstepd of the batch step killed", _batch_slurmstepd, goes_on=True),
    Fault("node killed", _node_kill, after=_nodes_boot),
    Fault("network cut", _net_cut, after=_net_join),
    Fault("slurmctld killed and restarted", _slurmctld, goes_on=True),
    Fault("suspended and resumed", _suspend, goes_on=True),
    Fault("rank 1 killed, run on S3", lambda scene: os.kill(scene.rank(1), signal.SIGKILL), remote=True),
]


def outcome_of(scene: Scene) -> Outcome:
    return Outcome(scene.tensors(), scene.told())


@contextlib.contextmanager
def store_of_all_nodes(folder: Path) -> Iterator[str]:
    """The URL of a new run on an S3 server that all nodes reach, and this process, too."""
    with (
        servers.S3Server(folder) as server,
        servers.FaultProxy(server, address=HEAD) as proxy,
        servers.used(proxy.environment),
    ):
        yield proxy.fresh_url()


def undisturbed(folder: Path, processes: int = 4) -> Outcome:
    """What the run comes to on this machine, without Slurm."""
    scene = Scene(folder)
    scene.toolkit("train", "job.yaml", f"run.dir={scene.url}", "--processes", str(processes))
    return outcome_of(scene)


@contextlib.contextmanager
def scene_in(folder: Path, **settings: Any) -> Iterator[Scene]:
    """A scene whose job is gone at the end."""
    scene = Scene(folder, **settings)
    try:
        yield scene
    finally:
        scene.release()
        if scene.job_id:
            with contextlib.suppress(slurm.SlurmError):
                slurm.cancel(scene.job_id)


def suffer(fault: Fault, folder: Path, expected: Outcome, **settings: Any) -> tuple[float, int]:
    """Inflict it, and check all that must hold afterwards. Returns (seconds until the first new step, steps lost)."""
    with scene_in(folder, **settings) as scene:
        scene.hold()
        scene.submit(*fault.options)
        scene.wait_until_held()
        start_s = time.monotonic()
        try:
            fault.inflict(scene)
            if fault.warned:
                scene.wait_for(lambda: "told to stop" in scene.said(), "warning", STEP_S)
                scene.wait_for(lambda: len([*scene.folder.glob("told-*")]) == 4, "stop of every rank", STEP_S)
            scene.release()
            if fault.goes_on:
                scene.wait_for(lambda: HELD_AT in scene.starts()[0], "next step", STEP_S)
                took_s, lost = time.monotonic() - start_s, 0
            else:
                scene.wait_for(lambda: len(scene.starts()) > 1, "another start", STEP_S)
                took_s = time.monotonic() - start_s
                begun, first = scene.starts()[0][-1], scene.starts()[1][0]
                lost = begun + 1 - first  # the last of them may not have been finished
                most = 1 if fault.warned else begun % 10 + 1
                assert lost <= most, f"{lost} steps lost, at most {most} may be: {begun} was begun, {first} came next"
            scene.wait_for_the_end()
        finally:
            fault.after(scene)
        assert re.search(fault.said, scene.said()), f"{fault.said!r} is not in {scene.said()}"
        if fault.page:
            page = storage.read(scene.run.at("postmortem.md")).decode()
            assert re.search(fault.page, page), page
        status = scene.run.status() or {}
        assert (status["state"], status["exit"], status["step"]) == ("completed", 0, STEPS), status
        assert outcome_of(scene).same(expected), "it did not end as an undisturbed run"
        scene.wait_for(lambda: not scene.pids(), "end of every process", 30)
        return took_s, lost


WITHOUT_CHANCE = ("model.args.dropout=0.0", "log.samples=true")  # what is drawn a rank differs with their number
WITHIN = 1e-5


def shrink(folder: Path) -> tuple[float, float]:
    """A job on one or two nodes loses one of two, and goes on with the other. Returns (seconds until the first new
    step, the largest difference of a tensor to the undisturbed run's, by norms).
    """
    folder.mkdir()
    whole = Scene(folder / "undisturbed", changes=WITHOUT_CHANCE)
    whole.toolkit("train", "job.yaml", f"run.dir={whole.url}", *WITHOUT_CHANCE, "--processes", "4")
    with scene_in(folder / "shrunk", nodes="1:2", changes=WITHOUT_CHANCE) as scene:
        scene.hold()
        scene.submit()
        scene.wait_until_held()
        start_s = time.monotonic()
        try:
            _node_kill(scene)
            scene.release()
            scene.wait_for(lambda: len(scene.starts()) > 1, "another start", STEP_S)
            took_s = time.monotonic() - start_s
            scene.wait_for_the_end()
        finally:
            _nodes_boot(scene)
        assert (slurm.job_facts(scene.job_id) or scene).restarts == 0, "it was queued again"  # type: ignore[union-attr]
        worlds = [attempt["hosts"] for attempt in scene.run.provenance()["attempts"]]
        assert [len(hosts) for hosts in worlds] == [4, 2], worlds
        assert taken(scene.run) == taken(whole.run), "other samples"
        ours, theirs = scene.tensors(), whole.tensors()
        worst = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)) for name in ours)
        assert worst <= WITHIN, worst
        return took_s, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="part of a fault's name")
    given = parser.parse_args()
    failed = 0
    folder = Path(tempfile.mkdtemp(prefix="toolkit-cluster-", dir="/var/tmp"))
    expected = undisturbed(folder / "undisturbed")
    for fault in FAULTS:
        if given.only in fault.name:
            failed += not _told(fault, folder / fault.name.replace(" ", "-"), expected)
    if given.only in "shrink":
        took_s, worst = shrink(folder / "shrink")
        print(f"one of two nodes killed, --nodes 1:2: first new step after {took_s:.1f} s, weights within {worst:.1e}")
    if not failed:
        shutil.rmtree(folder)
    return min(failed, 1)


def _told(fault: Fault, folder: Path, expected: Outcome) -> bool:
    """Whether a fault is survived; says so in one line."""
    try:
        with store_of_all_nodes(folder.parent / "s3") if fault.remote else contextlib.nullcontext("") as run:
            took_s, lost = suffer(fault, folder, expected, run=run)
    except Exception:
        print(f"{fault.name}: FAILED\n{traceback.format_exc()}", flush=True)
        return False
    print(f"{fault.name}: first new step after {took_s:.1f} s, {lost} steps lost", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
