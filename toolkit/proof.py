"""`toolkit verify-resume`: a proof, on the user's own job, that kill -9 and resume change nothing.

The job runs undisturbed; again on as many ranks, killed at random steps and in the middle of saves; and once more, each
start on another number of ranks. Then samples, weights and metrics are compared.
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from toolkit import storage
from toolkit.checkpoint import Archive, reader
from toolkit.checkpoint.manifest import DTYPES, NAME
from toolkit.config import Job
from toolkit.errors import JobError, RunError
from toolkit.run import Run

POLL_S = 0.002
NOT_OF_THE_JOB = {"train/samples_per_s", "train/slowest_rank", "train/slowest_over_median", "checkpoint/failures"}


@dataclass(frozen=True)
class Plan:
    """What is to be tried. `kills` are those of each disturbed run."""

    job: str
    overrides: tuple[str, ...]
    processes: int
    other: int
    kills: int
    seed: int


@dataclass
class Comparison:
    """A disturbed run beside the undisturbed one. `metrics`: of the same steps; `values`: and with the same values."""

    name: str
    kills: int
    in_saves: int
    samples: bool
    weights: bool
    difference: float
    metrics: bool
    values: bool


def prove(plan: Plan, job: Job, folder: str, environment: Mapping[str, str], console: Console) -> int:
    """Run, kill, compare, and print the table. Returns 0 if nothing differs that must not, else 1."""
    job.check_ranks(max(plan.processes, plan.other))
    # Where the job saves by the clock alone, it is made to save by steps: at those that have a line of metrics anyway.
    saves = [] if job.checkpoint.every_steps else [f"checkpoint.every_steps={job.log.every_steps}"]
    words = [plan.job, *plan.overrides, *saves, "log.samples=true"]
    with contextlib.ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="toolkit-proof-"))
        whole = Run(storage.join(place, "undisturbed"))
        console.print(f"undisturbed, {_ranks(plan.processes)}")
        _Start([*words, f"run.dir={whole.url}"], plan.processes, environment).finish()
        found = []
        for name, ranks in (("same", [plan.processes]), ("other", [plan.processes, plan.other])):
            title = f"killed, {' and '.join(map(str, ranks))} {'ranks' if ranks != [1] else 'rank'}"
            run = Run(storage.join(place, f"killed-{name}"))
            kills, in_saves = _disturbed(plan, [*words, f"run.dir={run.url}"], run, ranks, whole, environment, console)
            found.append(_compared(title, kills, in_saves, whole, run))
    console.print(_table(found))
    same, other = found
    good = same.samples and same.weights and same.values and other.samples and other.metrics
    console.print("nothing differs that must not" if good else "NOT EQUAL: see the table", highlight=False)
    return 0 if good else 1


class _Start:
    """One `toolkit train`."""

    def __init__(self, words: Sequence[str], processes: int, environment: Mapping[str, str]) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the start
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toolkit", "train", *words, "--processes", str(processes)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            # The number of threads changes sums, and another number of ranks would choose another.
            env={"OMP_NUM_THREADS": "1", **environment},
        )

    def finish(self) -> None:
        """Wait for its end. Raises RunError with what it said if it failed, JobError if it was refused."""
        try:
            status = self.process.wait()
        finally:
            self.kill()
        if status:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace")[-2000:]
            raise (JobError if status == 2 else RunError)(f"a run ended with exit status {status}; it said:\n{said}")

    def kill(self) -> None:
        """kill -9 of the command and all below it, as when the machine goes away."""
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = [psutil.Process(self.process.pid)]
            everyone += everyone[0].children(recursive=True)
            for act in (psutil.Process.suspend, psutil.Process.kill):
                for one in everyone:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        act(one)
            psutil.wait_procs(everyone, timeout=30)
        self.process.wait()


def _disturbed(
    plan: Plan,
    words: Sequence[str],
    run: Run,
    ranks: Sequence[int],
    whole: Run,
    environment: Mapping[str, str],
    console: Console,
) -> tuple[int, int]:
    """Start, kill, start again, … and let it end. Returns (kills, those of them in the middle of a save)."""
    total = (whole.status() or {})["total"]
    chance = random.Random(plan.seed)
    moments = sorted(chance.sample(range(1, total), min(plan.kills, total - 1)))
    kills = in_saves = 0
    for number, step in enumerate(moments):
        start = _Start([*words], ranks[number % len(ranks)], environment)
        try:
            if _reached(start, run, step):
                saving = number % 2 == 1 and _in_save(start, run)
                if start.process.poll() is None:
                    start.kill()
                    kills, in_saves = kills + 1, in_saves + saving
                    where = " in a save" if saving else ""
                    console.print(f"{_ranks(ranks[number % len(ranks)])}: killed after step {step}{where}")
        finally:
            start.kill()
    _Start([*words], ranks[len(moments) % len(ranks)], environment).finish()
    return kills, in_saves


def _reached(start: _Start, run: Run, step: int) -> bool:
    """Wait until the run is about to take a step. False if it ended before."""
    while start.process.poll() is None:
        steps = taken(run)
        if steps and max(steps) >= step:
            return True
        time.sleep(POLL_S)
    return False


def _in_save(start: _Start, run: Run) -> bool:
    """Wait for the middle of the next save: a step's folder without a manifest. False if the run ended before."""
    url = run.at("checkpoints")
    while start.process.poll() is None:
        for name in storage.names(url)[::-1]:
            if name.startswith("step-") and NAME not in storage.sizes(storage.join(url, name)):
                return True
        time.sleep(POLL_S)
    return False


def taken(run: Run) -> dict[int, list[int]]:
    """Step -> the samples that it took, sorted, over all ranks. Of several times that it was taken the last counts."""
    found: dict[int, tuple[int, list[int]]] = {}
    for name in storage.names(run.at("logs")):
        if not name.startswith("samples-"):
            continue
        attempt = int(name.split("-")[1])
        records = map(json.loads, storage.read(run.at("logs", name)).rpartition(b"\n")[0].splitlines())
        for step, mine in {record["step"]: record["samples"] for record in records}.items():
            before, samples = found.get(step, (0, []))
            if attempt >= before:
                found[step] = (attempt, (samples if attempt == before else []) + mine)
    return {step: sorted(samples) for step, (_, samples) in found.items()}


def _compared(name: str, kills: int, in_saves: int, whole: Run, run: Run) -> Comparison:
    expected, found = _tensors(whole), _tensors(run)
    equal = expected.keys() == found.keys() and all(_same_bits(expected[name], found[name]) for name in expected)
    difference = _relative(expected, found)
    lines, others = _lines(whole), _lines(run)
    same_steps = [line["step"] for line in lines] == [line["step"] for line in others]
    return Comparison(name, kills, in_saves, taken(whole) == taken(run), equal, difference, same_steps, lines == others)


def _tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint."""
    archive = Archive(run.at("checkpoints"))
    manifest = archive.whole(archive.find("last"))
    tensors = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, entry in manifest.tensors.items()}
    reader.fill(archive.folder(manifest.step), manifest, tensors)
    return tensors


def _lines(run: Run) -> list[dict[str, Any]]:
    """The run's metrics as far as they are a function of the job."""
    return [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in run.metrics.read()]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_kind = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same_kind and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _relative(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """|expected - found| / |expected| over all weights of the model together."""
    weights = {name: tensor.double() for name, tensor in expected.items() if name.startswith("model/")}
    if any(name not in found or found[name].shape != tensor.shape for name, tensor in weights.items()):
        return float("inf")
    squares = sum((tensor - found[name].double()).square().sum().item() for name, tensor in weights.items())
    whole = sum(tensor.square().sum().item() for tensor in weights.values())
    return float((squares / whole) ** 0.5) if whole else 0.0


def _table(found: Sequence[Comparison]) -> Table:
    table = Table("run", "kill -9", "in saves", "samples", "weights", "metrics")
    for row in found:
        weights = "equal, bit for bit" if row.weights else f"differ by {row.difference:.1e} of their norm"
        metrics = "of the same steps" if row.metrics and not row.values else _yes(row.values)
        words = [_yes(row.samples), weights, metrics]
        table.add_row(row.name, str(row.kills), str(row.in_saves), *words)
    return table


def _yes(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
