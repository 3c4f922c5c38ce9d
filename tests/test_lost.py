"""Lost steps in one process: what counts as lost, what a skipped step leaves, and a stream without some batches."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Workplace
from tests.dist.conftest import Stage, staged
from tests.planted import bad, plant, sample_of, skip_from_the_start
from toolkit import persistence, proof
from toolkit.checkpoint import Archive, Checkpointer
from toolkit.config import Component, load_job
from toolkit.datasets.loader import Batch
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.stream import batch_numbers
from toolkit.errors import JobError
from toolkit.lost import Guard, LostLossError
from toolkit.observers.checkpoints import Checkpoints
from toolkit.optim import Ema, build_optimizer
from toolkit.run import Run
from toolkit.tasks import Classification
from toolkit.trainer import Trainer

CPU = torch.device("cpu")
SIZE, CLASSES = 12, 3

OPTIMIZERS = {
    "adamw": Component(name="adamw", args={"lr": 0.1}),
    "adam": Component(name="adam", args={"lr": 0.1}),
    "momentum": Component(name="sgd", args={"lr": 0.1, "momentum": 0.9}),
    "sgd": Component(name="sgd", args={"lr": 0.1}),
    "told by the host": Component(name="adamw", args={"lr": 0.1, "foreach": True}),
}


def batch(step: int, value: float | None = None) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(SIZE, 5, generator=generator)
    if value is not None:
        inputs[3, 2] = value
    return [Batch(inputs, torch.randint(CLASSES, (SIZE,), generator=generator), np.arange(SIZE))]


def trainer_of(guard: Guard | None = None, optimizer: str = "adamw", task: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    settings = {"device": CPU, "total_steps": 6, "global_batch_size": SIZE, "guard": guard} | options
    built = build_optimizer(model, OPTIMIZERS[optimizer], CPU)
    return Trainer(model, task or Classification(), built, lambda step: 1 / (step + 1), **settings)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All weights, buffers and what the optimizer remembers."""
    found = dict(trainer.state.model.state_dict())
    for number, state in trainer.state.optimizer.state_dict()["state"].items():
        found |= {f"{number}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return found


# -- skipping


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lost", [0, 2, 5])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_skipped_step_leaves_everything_as_it_was(
    equal: Callable[..., bool], optimizer: str, lost: int, clip: float | None
) -> None:
    skipping = trainer_of(Guard("skip"), optimizer, clip_grad_norm=clip)
    skipping.fit([batch(step, torch.nan if step == lost else None) for step in range(6)])
    omitting = trainer_of(None, optimizer, clip_grad_norm=clip)
    losses = []
    for step in range(6):
        if step == lost:
            omitting.state.step += 1
        else:
            omitting.step(batch(step))
            losses.append(omitting.mean_loss())
            omitting.interval.restart()
    assert equal(everything(skipping), everything(omitting))
    assert skipping.mean_loss() == pytest.approx(sum(losses) / 5), "of the steps that were taken"
    (event,) = skipping.interval.told()
    assert (event["event"], event["step"], event["rank"]) == ("skip", lost + 1, 0)
    assert event["positions"] == [lost * SIZE, lost * SIZE + SIZE - 1]


def test_where_every_step_was_skipped_there_is_no_mean_loss() -> None:
    trainer = trainer_of(Guard("skip"))
    trainer.step(batch(0, torch.inf))
    assert np.isnan(trainer.mean_loss())
    assert len(trainer.interval.told()) == 1


def test_an_average_of_weights_stays_finite() -> None:
    trainer = trainer_of(Guard("skip"))
    trainer.state.ema = Ema(trainer.state.model, 0.9)
    for step in range(3):
        trainer.step(batch(step, torch.nan if step == 1 else None))
        trainer.state.ema.update(trainer.state.model)
    assert all(tensor.isfinite().all() for tensor in trainer.state.ema.tensors.values())


@pytest.mark.parametrize("policy", [Guard("skip"), Guard("rollback"), Guard("stop", spike_grad_norm=1e6)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_policy_changes_no_bit_where_nothing_is_lost(
    equal: Callable[..., bool], policy: Guard, clip: float | None
) -> None:
    plain, guarded = trainer_of(None, clip_grad_norm=clip), trainer_of(policy, clip_grad_norm=clip)
    for trainer in (plain, guarded):
        trainer.fit([batch(step) for step in range(6)])
    assert equal(everything(plain), everything(guarded))
    assert plain.mean_loss() == guarded.mean_loss()
    assert guarded.interval.told() == []


class Weighted(Classification):
    """Every second sample counts."""

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return super().loss(output, target), (torch.arange(len(target)) % 2).float()


def test_weighted_losses_are_skipped_alike() -> None:
    trainer = trainer_of(Guard("skip"), task=Weighted())
    trainer.fit([batch(step, torch.nan if step == 1 else None) for step in range(3)])
    assert all(tensor.isfinite().all() for tensor in everything(trainer).values())
    assert trainer.mean_loss() > 0
    assert [event["step"] for event in trainer.interval.told()] == [2]


class Shifted(Classification):
    """A loss that is infinite, with a gradient that is not."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target) + torch.inf


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_lost_loss_with_a_finite_gradient_was_no_step_to_skip(policy: str) -> None:
    trainer = trainer_of(Guard(policy), task=Shifted())
    trainer.step(batch(0))
    with pytest.raises(LostLossError, match="the loss is inf in step 1 "):
        trainer.mean_loss()


class Steep(Classification):
    """A loss that is finite, with a gradient that is not: the root of zero."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target) + (output - output.detach()).abs().sum(1).sqrt()


@pytest.mark.parametrize(
    ("policy", "clip"), [("stop", 1.0), ("skip", None), ("rollback", None)], ids=["stop", "skip", "rollback"]
)
def test_a_lost_gradient_is_found_before_it_can_be_saved(policy: str, clip: float | None) -> None:
    trainer = trainer_of(Guard(policy), task=Steep(), clip_grad_norm=clip)
    trainer.step(batch(0))
    words = "the gradient of step 1 is not finite, though the loss of every rank is"
    if policy == "skip":
        trainer.mean_loss()
        assert trainer.interval.told()[0]["why"] == words
        assert trainer.interval.told()[0]["rank"] is None
    else:
        with pytest.raises(LostLossError, match=words):
            trainer.mean_loss()


# -- spikes


class Spiking(Classification):
    """The second loss is a thousand times what it should be."""

    calls = 0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return super().loss(output, target) * (1000 if self.calls == 2 else 1)


def test_a_gradient_above_the_limit_is_skipped(equal: Callable[..., bool]) -> None:
    skipping, omitting = trainer_of(Guard("skip", spike_grad_norm=20.0), task=Spiking()), trainer_of()
    skipping.fit([batch(step) for step in range(3)])
    for step in (0, 2):
        omitting.state.step = step
        omitting.step(batch(step))
    assert equal(everything(skipping), everything(omitting))
    assert skipping.mean_loss() < 20
    (event,) = skipping.interval.told()
    norm = skipping.interval.norms[1].item()
    assert event["why"] == f"the gradient of step 2 has an L2 norm of {norm:.4g}; train.spike_grad_norm is 20"


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_spike_is_lost_under_every_policy(policy: str) -> None:
    trainer = trainer_of(Guard(policy, spike_grad_norm=1e-6))
    trainer.step(batch(0))
    with pytest.raises(LostLossError, match=r"has an L2 norm of .*; train.spike_grad_norm is 1e-06"):
        trainer.mean_loss()


@pytest.mark.parametrize("policy", ["train.on_nan=skip", "train.on_nan=rollback", "train.spike_grad_norm=5.0"])
def test_fp16_which_skips_by_itself_takes_no_other_policy(workplace: Workplace, policy: str) -> None:
    with pytest.raises(JobError, match="in fp16 the loss scaler leaves out steps"):
        load_job(str(workplace.folder / "digits.yaml"), ["train.precision=fp16", policy], {})


# -- the stream without some batches


@pytest.mark.parametrize("skipped", [[], [0], [3], [2, 3, 7], [0, 1, 2], [5, 9, 10, 11]])
def test_a_step_takes_the_next_batch_that_is_not_skipped(skipped: list[int]) -> None:
    left = [number for number in range(40) if number not in skipped]
    assert batch_numbers(np.arange(20), skipped).tolist() == left[:20]
    for ranks in (1, 2, 4):
        taken: list[list[int]] = [[] for _ in range(20)]
        whole: list[list[int]] = [[] for _ in range(40)]
        for rank in range(ranks):
            sampler = ElasticDistributedSampler(range(50), ranks, rank, seed=3, global_batch_size=7)
            for step in range(40):
                whole[step] += sampler.share(step)[1].tolist()
            sampler.skip(skipped)
            for step in range(20):
                taken[step] += sampler.share(step)[1].tolist()
        assert taken == [whole[number] for number in left[:20]]


def test_a_checkpoint_knows_what_is_skipped_and_says_nothing_where_nothing_is(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path / "checkpoints"))
    for step, skipped in enumerate([[], [4, 9]]):
        saved = trainer_of()
        saved.state.step, saved.state.skipped = step, skipped
        saver = Checkpointer(archive)
        saver.save(saved.state)
        saver.wait()
        state = json.loads(next(Path(archive.folder(step)).glob("state-*.json")).read_text())
        assert state.get("skipped", []) == skipped
        assert ("skipped" in state) == bool(skipped)
        loaded = trainer_of()
        loaded.state.skipped = [1]
        assert Checkpointer(archive).resume(loaded.state) == step
        assert loaded.state.skipped == skipped


# -- whole runs

TRAIN = ["train", "planted.yaml", "--processes=1"]


@pytest.fixture
def stage(workplace: Workplace) -> Iterator[Stage]:
    with staged(workplace) as stage:
        plant(stage)
        yield stage


def events(stage: Stage, run: str) -> list[dict[str, Any]]:
    return [event for line in stage.place.metrics(run) for event in line.get("events", [])]


def test_two_batches_are_rolled_back_from_and_both_are_told_of(
    stage: Stage, equal: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [sample_of(step, 0, 1) for step in (2, 3)]  # nothing has been saved yet but the beginning
    said = stage.run(*TRAIN, *bad(*samples), "train.on_nan=rollback", "run.dir=runs/x", "log.samples=true")
    assert said.count("rolled back to step 0") == 2
    assert "rollback 2 of 3" in said
    told = [(event["event"], event["step"], event["rank"], event["positions"]) for event in events(stage, "runs/x")]
    # The second is met in step 3, for by then batch 2 is left out.
    assert told == [("rollback", 3, 0, [64, 95]), ("rollback", 3, 0, [96, 127])]
    monkeypatch.syspath_prepend(str(stage.folder))
    skip_from_the_start(stage.folder, "runs/without", 2, 3)
    stage.run(*TRAIN, "run.dir=runs/without", "log.samples=true")
    assert proof.taken(Run(str(stage.folder / "runs/x"))) == proof.taken(Run(str(stage.folder / "runs/without")))
    assert equal(stage.place.tensors("runs/x", 24), stage.place.tensors("runs/without", 24))


def test_a_nan_that_does_not_come_back_is_rolled_back_from_once(stage: Stage) -> None:
    words = [*TRAIN, *bad(sample_of(12, 0, 1), once=True), "train.on_nan=rollback", "run.dir=runs/x"]
    said = stage.run(*words, "data.workers=1")
    assert said.count("rolled back to step 10") == 1
    assert stage.place.status("runs/x")["state"] == "completed"
    assert len(events(stage, "runs/x")) == 1


@pytest.mark.parametrize("most", [0, 1])
def test_after_the_last_rollback_the_run_ends_in_words_and_may_go_on_with_more(stage: Stage, most: int) -> None:
    samples = [sample_of(step, 0, 1) for step in (12, 13)]
    words = [*TRAIN, *bad(*samples), "train.on_nan=rollback", "run.dir=runs/x"]
    said = stage.run(*words, f"train.max_rollbacks={most}", status=1)
    assert said.count("rolled back") == most
    assert f"the loss is nan in step 13 (positions {(12 + most) * 32} to" in said
    assert f"train.max_rollbacks is {most}, and as many batches have been left out: sample {samples[most]}" in said
    assert "| first to fail | rank 0 |" in (stage.folder / "runs/x/postmortem.md").read_text()
    assert "completed" in stage.run(*words, "train.max_rollbacks=2"), "a policy may change between two starts"


def test_a_save_in_flight_is_saved_before_a_lost_step_ends_the_run(workplace: Workplace) -> None:
    job = load_job(str(workplace.folder / "digits.yaml"), [], {})
    trainer, saver = trainer_of(), Checkpointer(str(workplace.folder / "checkpoints"))
    with (
        pytest.raises(LostLossError, match="as asked"),
        persistence.rolling_back(Run(""), job, trainer, Checkpoints(saver), print),
    ):
        saver.save(trainer.state, before_commit=lambda: time.sleep(0.5))
        raise LostLossError("as asked", range(1))
    assert saver.archive.steps() == [0]


class Torn(Classification):
    """Losses that are finite, with gradients that are not: the root of zero."""

    def loss(self, output: Tensor, target: Tensor) -> Any:
        return super().loss(output, target) + (output.sum(1) * 0).abs().sqrt()


def test_weights_that_a_gradient_alone_has_spoilt_are_not_saved(tmp_path: Path) -> None:
    trainer = trainer_of(task=Torn())
    trainer.step(batch(0))
    assert trainer.mean_loss() > 0
    saves = Checkpoints(Checkpointer(Archive(str(tmp_path))))
    with pytest.raises(LostLossError, match="a weight is no finite number after step 1, though every loss was"):
        saves.save_first(trainer)
    assert not list(tmp_path.iterdir())
