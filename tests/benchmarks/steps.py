"""CPU seconds a step, beside a loop as tutorials write it. `make bench`.

Ours runs with everything on: progress bar, a line of metrics every 20 steps, heartbeat, a checkpoint every 500 steps.
Both sides clip, use the same model and the same optimizer class, take turns, and run on one thread a rank; of five
rounds the median counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from toolkit import session
from toolkit.config import load_job
from toolkit.datasets.digits import Digits
from toolkit.datasets.text import Text
from toolkit.distributed import ALONE, Ranks, ranks_from
from toolkit.models.cnn import Cnn
from toolkit.models.gpt import Gpt
from toolkit.models.mlp import Mlp
from toolkit.trainer import Trainer

ROUNDS = 5
PLAY = Path(__file__).parent.parent.parent / "jobs/data/as_you_like_it.txt"
JOB = """
task: {task}
data:      {{train: {{name: {data}}}, global_batch_size: {batch}}}
model:     {{name: {model}}}
optimizer: {{name: adamw, args: {{lr: 1e-3}}}}
train:     {{max_steps: {steps}, clip_grad_norm: 1.0, device: cpu}}
checkpoint: {{every_steps: 500}}
log:       {{every_steps: 20}}
"""


class Windows(Dataset[Any]):
    """Next-token windows, sample by sample."""

    def __init__(self, tokens: torch.Tensor, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = index * self.context
        return self.tokens[at : at + self.context], self.tokens[at + 1 : at + self.context + 1]


class Case:
    """A model, its data and a loss, once for our job file and once for a hand-written loop."""

    def __init__(
        self, name: str, steps: int, batch: int, bound: float, make: Callable[[], tuple[Any, Any]], **job: str
    ) -> None:
        self.name, self.steps, self.batch, self.bound, self.make, self.job = name, steps, batch, bound, make, job

    def by_hand(self, ranks: Ranks) -> float:
        """CPU seconds a step of the tutorial's loop."""
        torch.manual_seed(0)
        model, dataset = self.make()
        if ranks.world_size > 1:
            model = nn.parallel.DistributedDataParallel(model)
        sampler: Any = DistributedSampler(dataset) if ranks.world_size > 1 else None
        loader = DataLoader(
            dataset, batch_size=self.batch // ranks.world_size, shuffle=sampler is None, sampler=sampler
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step, start_s = 0, time.process_time()
        while step < self.steps:
            for inputs, targets in loader:
                optimizer.zero_grad()
                outputs = model(inputs)
                loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                if step == self.steps:
                    break
        return (time.process_time() - start_s) / self.steps

    def ours(self, ranks: Ranks, folder: str) -> float:
        """CPU seconds a step of `Trainer.fit` in a whole run of the job file, in a folder that all ranks share."""
        with open(os.devnull, "w") as nowhere:
            path = Path(folder, f"job-{ranks.rank}.yaml")
            path.write_text(JOB.format(steps=self.steps, batch=self.batch, **self.job))
            job = load_job(str(path), [f"run.dir={folder}/run", "run.name=bench"])
            console = Console(file=nowhere, force_terminal=True, quiet=not ranks.leads)
            with _TimedFit() as timed:
                session.train(job, ranks, console)
        return timed.cpu_s / self.steps


class _TimedFit:
    """Measures `Trainer.fit` from outside it."""

    def __enter__(self) -> "_TimedFit":
        self.fit = Trainer.fit

        def timed(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            start_s = time.process_time()
            self.fit(trainer, *args, **kwargs)
            self.cpu_s = time.process_time() - start_s

        Trainer.fit = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Trainer.fit = self.fit  # type: ignore[method-assign]


def _images(model: nn.Module) -> tuple[nn.Module, Any]:
    digits = Digits("all")
    return model, TensorDataset(digits.inputs, digits.targets)


def _windows() -> tuple[nn.Module, Any]:
    text = Text(str(PLAY), context=64)
    return Gpt(text.vocab_size, (64,), layers=2, width=64), Windows(torch.from_numpy(text.tokens.astype(np.int64)), 64)


IMAGES = {"task": "classification", "data": "digits, args: {split: all}"}
CASES = {
    case.name: case
    for case in (
        Case("mlp", 3000, 32, 0.77, lambda: _images(Mlp((1, 8, 8), 10)), model="mlp", **IMAGES),
        Case("cnn", 400, 64, 1.03, lambda: _images(Cnn((1, 8, 8), 10)), model="cnn", **IMAGES),
        Case(
            "gpt", 100, 16, 1.03, _windows, task="language_modeling", model="gpt, args: {layers: 2, width: 64}",
            data=f"text, args: {{path: {PLAY}, context: 64}}",
        ),
    )
}  # fmt: skip
TWO_RANKS = 1.03


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--as-rank", nargs=3, metavar=("SIDE", "CASE", "DIR"))
    side = parser.parse_args().as_rank
    torch.set_num_threads(1)
    if side:
        _as_rank(*side)
    failures = 0
    print(f"{'case':14}{'ours us':>10}{'hand us':>10}{'ratio':>8}{'bound':>8}")
    for case in CASES.values():
        rounds = [(_alone(case), case.by_hand(ALONE)) for _ in range(ROUNDS)]
        failures += _print(case.name, rounds, case.bound)
    for name in CASES:
        rounds = [(_two_ranks("ours", name), _two_ranks("hand", name)) for _ in range(ROUNDS)]
        failures += _print(f"{name}, 2 ranks", rounds, TWO_RANKS)
    return int(failures > 0)


def _print(name: str, rounds: list[tuple[float, float]], bound: float) -> bool:
    """Print the medians and their ratio. True if it is over the bound."""
    ours, hand = (median(side) for side in zip(*rounds, strict=True))
    ratio = ours / hand
    print(
        f"{name:14}{ours * 1e6:10.0f}{hand * 1e6:10.0f}{ratio:8.3f}{bound:8.2f}{'  over' * (ratio > bound)}", flush=True
    )
    return ratio > bound


def _alone(case: Case) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return case.ours(ALONE, folder)


def _two_ranks(side: str, name: str) -> float:
    """The mean over two ranks, each in a process of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [*command, "--as-rank", side, name, folder]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=True)
    seconds = [json.loads(line)["cpu_s"] for line in done.stdout.splitlines() if line.startswith("{")]
    return sum(seconds) / len(seconds)


def _as_rank(side: str, name: str, folder: str) -> NoReturn:
    ranks, case = ranks_from(os.environ), CASES[name]
    if side == "hand":
        dist.init_process_group("gloo")
    seconds = case.ours(ranks, folder) if side == "ours" else case.by_hand(ranks)
    os.write(1, (json.dumps({"cpu_s": seconds}) + "\n").encode())  # in one piece, for two ranks share the pipe
    if side == "hand":
        dist.barrier()
    os._exit(0)  # gloo sometimes aborts while it is torn down, and the figure is already out


if __name__ == "__main__":
    sys.exit(main())
