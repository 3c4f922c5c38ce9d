"""Mixup and label smoothing on real ranks: the number of ranks and a kill change nothing of what is learnt."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.dist.test_exactness import without_speed
from tests.dist.test_worlds import distance

STEPS = 40
MIXED = [
    "train", "digits.yaml", f"train.max_steps={STEPS}", "schedule.name=held:cosine", "train.precision=fp32",
    "data.transforms=[{name: mixup, args: {alpha: 0.4}}]", "task={name: classification, args: {label_smoothing: 0.1}}",
    "log.every_steps=1", "eval.every_steps=20",
]  # fmt: skip


def test_the_weights_of_two_and_four_ranks_are_those_of_one(stage: Any) -> None:
    stage.run(*MIXED, "run.dir=runs/1")
    alone, last = stage.place.tensors("runs/1", STEPS), stage.place.metrics("runs/1")[-1]
    for processes in (2, 4):
        run = f"runs/{processes}"
        stage.run(*MIXED, f"--processes={processes}", f"run.dir={run}", "train.micro_batch_size=5")
        assert distance(stage.place.tensors(run, STEPS), alone) <= 1e-5
        assert stage.place.metrics(run)[-1]["train/loss"] == pytest.approx(last["train/loss"], rel=1e-5)

    stage.run(*MIXED, "run.dir=runs/plain", "data.transforms=[]", "task=classification")
    assert distance(stage.place.tensors("runs/plain", STEPS), alone) > 1e-2, "it does learn something else"


def test_a_killed_and_resumed_run_ends_bit_equal(stage: Any, equal: Callable[..., bool]) -> None:
    words = [*MIXED, "--processes=2", "data.workers=1", "train.micro_batch_size=12"]
    stage.run(*words, "run.dir=runs/whole")
    process = stage.hold(*words, "run.dir=runs/killed", before=25, ranks=range(2))
    stage.wait_for_save("runs/killed", 20)
    stage.kill_whole(process)
    assert "resuming at step 20" in stage.run(*words, "run.dir=runs/killed")
    assert equal(stage.place.tensors("runs/killed", STEPS), stage.place.tensors("runs/whole", STEPS))
    assert without_speed(stage.place.metrics("runs/killed")) == without_speed(stage.place.metrics("runs/whole"))
