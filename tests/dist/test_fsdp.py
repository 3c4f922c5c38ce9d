"""FSDP2 is DDP in less memory: the same curve, the same checkpoints, the same exactness."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workplace
from tests.dist.conftest import ROOT, TORCHRUN, Stage, staged
from toolkit.proof import NOT_OF_THE_JOB

SCRIPT = Path(__file__).with_name("sharded.py")
STEPS = 50
# A constant learning rate, whatever the number of steps, and no dropout, which is drawn by rank.
GPT = [
    "train", "jobs/char_gpt.yaml", f"train.max_steps={STEPS}", "schedule.name=held:cosine",
    "schedule.args={warmup_steps: 5, final: 1.0}", "model.args.dropout=0.0",
    "log.every_steps=1", "checkpoint.every_steps=20", "model.args.layers=2", "model.args.width=32",
    "data.global_batch_size=32", "data.train.args.context=32", "data.val.args.context=32", "eval.batch_size=256",
    "eval.every_epochs=null", "eval.every_steps=30",
]  # fmt: skip
# With its own epsilon Adam makes whole steps of gradients that are nothing but rounding.
CNN = [
    "train", "jobs/digits_cnn.yaml", f"train.max_steps={STEPS}", "schedule.name=held:cosine",
    "schedule.args.warmup_steps=5", "log.every_steps=1", "checkpoint.every_steps=20", "model.args.width=8",
    "optimizer.args.eps=1e-5", "eval.every_epochs=1", "train.ema_decay=0.9",
]  # fmt: skip
JOBS = {2: GPT, 4: CNN}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One folder for all of these tests: what one has run, the others compare with."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    with staged(Workplace(folder)) as stage:
        yield stage


def whole(world: Stage, ranks: int, strategy: str) -> str:
    """The undisturbed run of the job at so many ranks: its folder, run when first asked for."""
    run = f"runs/{strategy}-{ranks}"
    if not (world.folder / run).exists():
        world.run(*JOBS[ranks], f"--processes={ranks}", f"train.strategy={strategy}", f"run.dir={run}")
    return run


def curve(world: Stage, run: str, metric: str = "train/loss") -> list[float]:
    return [line[metric] for line in world.place.metrics(run) if metric in line]


def distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_curve_is_that_of_ddp(world: Stage, ranks: int) -> None:
    fsdp, ddp = whole(world, ranks, "fsdp"), whole(world, ranks, "ddp")
    assert len(curve(world, fsdp)) == STEPS
    for metric in ("train/loss", "train/grad_norm", "val/loss"):
        assert distance(curve(world, fsdp, metric), curve(world, ddp, metric)) <= 1e-5
    assert curve(world, fsdp)[-1] < curve(world, fsdp)[0] - 0.2, "it has learnt something"


def test_a_run_goes_from_ddp_to_fsdp_and_back_and_through_other_worlds(world: Stage) -> None:
    for steps, ranks, strategy in ((20, 2, "ddp"), (35, 4, "fsdp"), (40, 1, "fsdp"), (STEPS, 2, "ddp")):
        changes = [f"--processes={ranks}", f"train.max_steps={steps}", f"train.strategy={strategy}"]
        world.run(*GPT, *changes, "run.dir=runs/there")
    assert distance(curve(world, "runs/there"), curve(world, whole(world, 2, "ddp"))) <= 1e-5


@pytest.mark.parametrize(("ranks", "more"), [(2, ["train.activation_checkpointing=true"]), (4, [])])
def test_a_killed_and_resumed_run_ends_bit_equal(
    world: Stage, equal: Callable[..., bool], ranks: int, more: list[str]
) -> None:
    """At 2 ranks, moreover, activation checkpointing, which begins in the middle, changes no bit."""
    undisturbed = whole(world, ranks, "fsdp")
    words = [*JOBS[ranks], f"--processes={ranks}", "train.strategy=fsdp", f"run.dir=runs/killed-{ranks}"]
    process = world.hold(*words, before=38, ranks=range(ranks))
    world.wait_for_save(f"runs/killed-{ranks}", 20)
    world.kill_whole(process)
    assert "resuming at step" in world.run(*words, *more)
    killed = f"runs/killed-{ranks}"
    assert equal(world.place.tensors(killed, STEPS), world.place.tensors(undisturbed, STEPS))
    lines, expected = (
        [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in world.place.metrics(run)]
        for run in (killed, undisturbed)
    )
    assert lines == expected


def test_one_process_evaluates_and_exports_what_four_have_sharded(world: Stage) -> None:
    run = whole(world, 4, "fsdp")
    found = json.loads(world.run("evaluate", run, "--split", "val"))
    last = world.place.metrics(run)[-1]
    assert found["val/accuracy"] == last["val/accuracy"]
    assert found["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert f"tensors of step {STEPS}" in world.run("checkpoints", run, "export", "--to", "model.safetensors")
    begun = [*CNN, "--processes=2", "train.strategy=fsdp", "train.max_steps=1", f"run.init_from={run}"]
    assert "26 tensors taken" in world.run(*begun, "run.dir=runs/begun")


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    """What differs between DDP and FSDP2 in each case of sharded.py."""
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, "--nproc-per-node", "4", SCRIPT],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_option_makes_the_steps_that_it_makes_under_ddp(differences: dict[str, dict[str, float]]) -> None:
    """At 4 ranks: clipping, accumulation, odd shares, token weights, EMA, frozen and tied weights, batch norm."""
    bounds = {"losses": 1e-5, "norms": 1e-5, "evaluation": 1e-5, "weights": 1e-4}
    rounded = {"losses": 2e-2, "norms": 1e-1, "evaluation": 5e-2, "weights": 5e-2}
    assert len(differences) >= 10
    for case, found in differences.items():
        for what, bound in (rounded if "bf16" in case else bounds).items():
            assert found[what] <= bound, (case, found)


def test_compressed_gradients_are_nearly_those_of_plain_ddp(differences: dict[str, dict[str, float]]) -> None:
    assert differences["bf16 gradients"]["weights"] > 1e-5, "nothing was rounded"
