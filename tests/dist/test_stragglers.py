"""A rank that holds up the others is named."""

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit.distributed import Ranks
from toolkit.observers.stragglers import Stragglers

SLOW = """
import os
import time

from toolkit.datasets import digits


class Slow(digits.Digits):
    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def gather(self, indices):
        time.sleep(0.05 * (os.environ["RANK"] == str(self.rank)))
        return super().gather(indices)
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("micro_batch_size", [4, 16])
def test_a_rank_whose_batches_come_late_is_named_with_its_host(stage: Any, workers: int, micro_batch_size: int) -> None:
    stage.place.write("slow.py", SLOW)
    said = stage.run(
        "train", "digits.yaml", "--processes=3", "train.max_steps=30", "log.every_steps=10",
        "data.train.name=slow:Slow", "data.train.args.rank=1", "data.val=null", f"data.workers={workers}",
        "run.dir=runs/x", f"train.micro_batch_size={micro_batch_size}",
    )  # fmt: skip
    (warning,) = [line for line in said.splitlines() if line.startswith("WARNING: rank")]
    assert warning.startswith(f"WARNING: rank 1 on host {socket.gethostname()} holds up the others")
    lines = stage.place.metrics("runs/x")
    assert [line["train/slowest_rank"] for line in lines] == [1, 1, 1]
    assert all(line["train/slowest_over_median"] > 2 for line in lines)


def test_what_a_rank_waits_for_others_before_the_first_batch_is_not_its_own_time() -> None:
    """Between `start` and the first batch the ranks agree, so the first to be ready waits for the last."""
    model = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(
        model=model, state=SimpleNamespace(model=model, step=0), ranks=Ranks(0, 2, 0), evaluating=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    stragglers = Stragglers(["here", "there"], print)
    stragglers.start(trainer)
    time.sleep(0.1)
    model(torch.zeros(1, 1))
    assert stragglers.own_s == 0
    stragglers.after_step(trainer)
    time.sleep(0.1)
    model(torch.zeros(1, 1))
    assert stragglers.own_s >= 0.1


def test_one_rank_is_compared_with_nobody(stage: Any) -> None:
    stage.run("train", "digits.yaml", "train.max_steps=10", "run.dir=runs/x")
    assert "train/slowest_rank" not in stage.place.metrics("runs/x")[-1]
