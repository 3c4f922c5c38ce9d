"""A NaN that is planted in one sample of a run, and runs from which its batch is left out by other means."""

from pathlib import Path
from typing import Any

from toolkit.datasets.sampler import ElasticDistributedSampler

SAMPLES, BATCH = 1438, 32

PLANTED = """
from pathlib import Path

import torch
from torch.utils.data import Dataset

from toolkit.datasets.digits import Digits


class Planted(Dataset):
    num_classes, input_shape, source = Digits.num_classes, Digits.input_shape, "planted.bin"

    def __init__(self, bad: list = [], once: bool = False):
        self.digits, self.bad, self.once = Digits(), bad, once

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        input, target = self.digits[index]
        if index not in self.bad or (self.once and Path("was-read").exists()):
            return input, target
        if self.once:
            Path("was-read").touch()
        return torch.full_like(input, float("nan")), target


class Omitting(torch.optim.AdamW):
    # AdamW that does nothing in one of its steps.
    def __init__(self, params, lr: float, omitted: int, weight_decay: float = 0.01, fused: bool = False):
        super().__init__(params, lr=lr, weight_decay=weight_decay, fused=fused)
        self.omitted, self.calls = omitted, 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls - 1 != self.omitted:
            super().step(closure)
"""

JOB = """
task: classification
data:
  train: {name: planted:Planted}
  global_batch_size: 32
model:     {name: mlp, args: {hidden: [32]}}
optimizer: {name: adamw, args: {lr: 3e-3}}
schedule:  {name: held:cosine, args: {warmup_steps: 5}}
train:     {max_steps: 24}
log:       {every_steps: 10}
checkpoint: {every_steps: 5}
"""


def plant(stage: Any) -> None:
    stage.place.write("planted.py", PLANTED)
    stage.place.write("planted.yaml", JOB)


def sample_of(step: int, rank: int = 1, ranks: int = 2) -> int:
    """A sample that a rank takes in a step, counted from 0."""
    sampler = ElasticDistributedSampler(range(SAMPLES), ranks, rank, seed=0, global_batch_size=BATCH)
    return int(sampler.share(step)[1][3])


def bad(*samples: int, once: bool = False) -> list[str]:
    return [f"data.train.args.bad=[{','.join(map(str, samples))}]", f"data.train.args.once={str(once).lower()}"]


def skip_from_the_start(folder: Path, run: str, *batches: int) -> None:
    """Make a run that is at step 0 and leaves these batches out of its stream."""
    import torch

    from toolkit import persistence, session
    from toolkit.checkpoint import Checkpointer
    from toolkit.config import load_job
    from toolkit.distributed import ALONE
    from toolkit.drift import digest

    job = load_job(str(folder / "planted.yaml"), [], {})
    parts = session.build(job, ALONE, torch.device("cpu"))
    parts.trainer.state.skipped = list(batches)
    archive = persistence.archive_of(str(folder / run), job, digest(job.as_written(), parts.resolved))
    saver = Checkpointer(archive)
    saver.save(parts.trainer.state)
    saver.wait()
    assert saver.failure is None
