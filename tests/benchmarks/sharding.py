"""Memory a rank with FSDP2, beside DDP: parameters, gradients and optimizer state, after two steps. `make bench`.

A GPT with AdamW on two ranks. The largest rank counts. Counted is what the tensors of each kind take, a part that is a
view of something larger as that; DDP's gradients are views of its buckets, and are counted once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.measure import Table
from toolkit import distributed, session
from toolkit.config import load_job
from toolkit.datasets.loader import batches
from toolkit.distributed import ranks_from

BOUND = 0.6
PLAY = Path(__file__).parent.parent.parent / "jobs/data/as_you_like_it.txt"
JOB = f"""
task: language_modeling
data:      {{train: {{name: text, args: {{path: {PLAY}, context: 32}}}}, global_batch_size: 4}}
model:     {{name: gpt, args: {{layers: 4, width: 256}}}}
optimizer: {{name: adamw, args: {{lr: 1e-3}}}}
train:     {{max_steps: 2, clip_grad_norm: 1.0, device: cpu}}
"""
KINDS = ("parameters", "gradients", "optimizer state")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--as-rank", metavar="STRATEGY")
    if strategy := parser.parse_args().as_rank:
        _as_rank(strategy)
    ours, ddp = _largest("fsdp"), _largest("ddp")
    table = Table()
    for kind in KINDS:
        print(f"{kind}, MiB a rank: FSDP2 {ours[kind] / 2**20:.2f}, DDP {ddp[kind] / 2**20:.2f}")
    table.at_most("MiB a rank, FSDP2 and DDP", sum(ours.values()) / 2**20, sum(ddp.values()) / 2**20, BOUND)
    return int(table.missed > 0)


def _largest(strategy: str) -> dict[str, int]:
    """Bytes by kind, of the rank of two that has most."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--as-rank", strategy]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == 2, done.stdout
    return max(ranks, key=lambda rank: sum(rank.values()))


def _as_rank(strategy: str) -> None:
    ranks, device = ranks_from(os.environ), torch.device("cpu")
    distributed.join(ranks, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sharding.yaml")
        path.write_text(JOB)
        job = load_job(str(path), [f"train.strategy={strategy}"])
    parts = session.build(job, ranks, device)
    trainer = parts.trainer
    first, second = batches(parts.steps, 0, 2, 0, device)
    trainer.step(first)
    trainer.backward(second)
    states = [value for state in trainer.state.optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]
    found = (_bytes(trainer.state.model.parameters()), _bytes(gradients), _bytes(states))
    os.write(1, (json.dumps(dict(zip(KINDS, found, strict=True))) + "\n").encode())  # in one piece
    distributed.leave()
    os._exit(0)  # gloo sometimes aborts while it is torn down, and the figure is already out


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What the memory behind some tensors takes here, each piece once."""
    storages = {part.data_ptr(): part for part in (distributed.local(each).untyped_storage() for each in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    sys.exit(main())
