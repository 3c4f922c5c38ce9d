"""The number of ranks is a matter of the machine: samples, weights and evaluations are those of one rank."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from toolkit.datasets.digits import Digits
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.split import held_out

STEPS, BATCH = 100, 32
DIGITS = ["train", "digits.yaml", f"train.max_steps={STEPS}", "schedule.name=held:cosine", "train.precision=fp32"]

RECORDING = """
import os
from pathlib import Path

from torch.utils.data import Dataset

from toolkit.datasets.digits import Digits


class Recorded(Dataset):
    \"\"\"Digits that write down who has asked for which samples, one line a batch.\"\"\"

    num_classes, input_shape = Digits.num_classes, Digits.input_shape

    def __init__(self):
        self.digits = Digits()

    def __len__(self):
        return len(self.digits)

    def __getitems__(self, indices):
        with open(f"asked-{os.environ.get('RANK', '0')}", "a") as file:
            file.write(" ".join(map(str, indices)) + "\\n")
        return [self.digits[index] for index in indices]
"""


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two models over the norm of the second."""

    def weights(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[name].double().flatten() for name in sorted(tensors) if name.startswith("model/")])

    return float((weights(one) - weights(other)).norm() / weights(other).norm())


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [4, 33, 64])
def test_every_step_has_the_same_samples_in_any_world(world_size: int, batch_size: int) -> None:
    whole = ElasticDistributedSampler(range(101), 1, 0, seed=3, global_batch_size=batch_size)
    shares = [
        ElasticDistributedSampler(range(101), world_size, rank, seed=3, global_batch_size=batch_size)
        for rank in range(world_size)
    ]
    assert max(share.batch_size for share in shares) - min(share.batch_size for share in shares) <= 1
    for step in (*range(8), 1000, 10**9):
        epochs, indices = (np.concatenate(parts) for parts in zip(*(s.share(step) for s in shares), strict=True))
        assert np.array_equal(epochs, whole.share(step)[0])
        assert np.array_equal(indices, whole.share(step)[1])


def test_three_real_ranks_read_each_sample_of_each_step_once(stage: Any) -> None:
    stage.place.write("recording.py", RECORDING)
    stage.run(
        "train", "digits.yaml", "--processes=3", "data.train.name=recording:Recorded", "train.max_steps=50",
        "eval.every_epochs=1000", "data.val=null", "run.dir=runs/recorded",
    )  # fmt: skip
    whole = ElasticDistributedSampler(range(len(Digits())), 1, 0, seed=0, global_batch_size=BATCH)
    lines = [(stage.folder / f"asked-{rank}").read_text().splitlines() for rank in range(3)]
    asked = [[list(map(int, line.split())) for line in of_rank[1:]] for of_rank in lines]  # the first is the rehearsal
    assert [len(of_rank) for of_rank in asked] == [50, 50, 50]
    for step in range(50):
        assert [index for of_rank in asked for index in of_rank[step]] == whole.share(step)[1].tolist()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one rank makes of DIGITS, filled by the first test that asks."""
    return {}


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_weights_are_those_of_one_rank(stage: Any, alone: dict[str, Any], processes: int) -> None:
    if not alone:
        stage.run(*DIGITS, "run.dir=runs/alone")
        alone |= stage.place.tensors("runs/alone", STEPS)
    stage.run(*DIGITS, f"--processes={processes}", "run.dir=runs/several")
    assert distance(stage.place.tensors("runs/several", STEPS), alone) <= 1e-5


def test_a_run_goes_on_in_smaller_and_larger_worlds(stage: Any) -> None:
    """Begun on 2 ranks and killed, it goes on with 1 and with 3: same samples a step, same end."""
    stage.place.write("recording.py", RECORDING)
    words = [*DIGITS, "data.train.name=recording:Recorded", "data.val=null"]
    process = stage.hold(*words, "--processes=2", "run.dir=runs/1", before=55, ranks=[0, 1])
    stage.wait_for_save("runs/1", 50)
    stage.kill_whole(process)
    shutil.copytree(stage.folder / "runs/1", stage.folder / "runs/3")
    stage.run(*words, "run.dir=runs/whole")

    whole = ElasticDistributedSampler(range(len(Digits())), 1, 0, seed=0, global_batch_size=BATCH)
    for processes in (1, 3):
        for path in stage.folder.glob("asked-*"):
            path.unlink()
        said = stage.run(*words, f"--processes={processes}", f"run.dir=runs/{processes}")
        assert "resuming at step 50" in said
        asked = [(stage.folder / f"asked-{rank}").read_text().splitlines()[1:] for rank in range(processes)]
        for step in range(50, STEPS):
            of_step = " ".join(of_rank[step - 50] for of_rank in asked)
            assert of_step == " ".join(map(str, whole.share(step)[1]))
        found = stage.place.tensors(f"runs/{processes}", STEPS)
        assert distance(found, stage.place.tensors("runs/whole", STEPS)) <= 1e-5
        assert [line["step"] for line in stage.place.metrics(f"runs/{processes}")] == [*range(10, STEPS + 1, 10)]


def test_evaluation_counts_every_sample_once_in_any_world(stage: Any) -> None:
    """With a learning rate of 0 the weights are the same everywhere, so the counts must be, too."""
    words = [
        "train", "digits.yaml", "train.max_steps=1", "optimizer.args.lr=0.0", "eval.batch_size=100",
        "data.test.args.split=all", "checkpoint.every_steps=null",
    ]  # fmt: skip
    found = {}
    for processes in (1, 2, 3, 5):
        stage.run(*words, f"--processes={processes}", f"run.dir=runs/{processes}")
        found[processes] = stage.place.metrics(f"runs/{processes}")[-1]
    hits = found[1]["test/accuracy"] * 1797
    assert hits == pytest.approx(round(hits), abs=1e-9)
    assert round(hits) > 0
    _, val = held_out(Digits(), 0.1, 0)
    assert (found[1]["val/accuracy"] * len(val)) == pytest.approx(round(found[1]["val/accuracy"] * len(val)), abs=1e-9)
    for line in found.values():
        assert line["test/accuracy"] == found[1]["test/accuracy"]
        assert line["val/accuracy"] == found[1]["val/accuracy"]
        assert line["test/loss"] == pytest.approx(found[1]["test/loss"], rel=1e-6)


def test_plain_torchrun_is_the_same_world(stage: Any, equal: Callable[..., bool]) -> None:
    words = [*DIGITS, "train.max_steps=20"]
    stage.run(*words, "--processes=2", "run.dir=runs/ours")
    said = stage.torchrun(2, *words, "run.dir=runs/plain")
    assert said.count("completed at step 20 of 20") == 1, "one rank speaks"
    assert "Traceback" not in said
    assert equal(stage.place.tensors("runs/plain", 20), stage.place.tensors("runs/ours", 20))


def test_a_rank_of_another_world_is_named_and_nothing_is_written(stage: Any) -> None:
    """Rank 1 has another number of threads, so its sums would differ: set where the job's own code is imported."""
    stage.place.write("sitecustomize.py", ODD)
    path = os.pathsep.join([str(ROOT), str(stage.folder)])
    err = stage.place.run(*DIGITS, "--processes=3", "run.dir=runs/x", status=2, PYTHONPATH=path, TMPDIR=str(stage.tmp))
    assert "the ranks are not of one world" in err
    assert "rank 1 on host" in err
    assert "has threads 2, 2 ranks have 1" in err
    assert err.count("not of one world") == 1
    assert not (stage.folder / "runs").exists()


ODD = """
import os
if os.environ.get("RANK") == "1":
    os.environ["OMP_NUM_THREADS"] = "2"
"""
