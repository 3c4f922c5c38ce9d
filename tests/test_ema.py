"""The moving average of the weights: its numbers, where it stands in for the weights, and that a run keeps it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from tests.conftest import DIGITS
from tests.test_trainer import CPU, network, samples, trainer_of, weights
from toolkit import evaluation, session
from toolkit.checkpoint import Archive
from toolkit.config import Job, load_job
from toolkit.distributed import ALONE
from toolkit.observers.averaging import Averaging
from toolkit.optim import Ema, freeze
from toolkit.trainer import Trainer


def averaged(decay: float = 0.9, *extra: nn.Module, **options: Any) -> Trainer:
    """A trainer of a small network whose weights are averaged."""
    model = network(*extra)
    return trainer_of(model, ema=Ema(model, decay), **options)


def drift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))


def bits(model: nn.Module) -> list[bytes]:
    """Every byte of every parameter, so that even one nan is not taken for another."""
    return [parameter.detach().flatten().view(torch.uint8).numpy().tobytes() for parameter in model.parameters()]


# -- the numbers


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_average_is_decay_of_itself_and_the_rest_of_the_weight(decay: float, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    ema = Ema(model, decay)
    expected = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    for _ in range(20):
        drift(model)
        ema.update(model)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    assert ema.tensors.keys() == expected.keys()
    for name, tensor in ema.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_an_average_has_at_least_full_precision(given: torch.dtype, kept: torch.dtype) -> None:
    assert {tensor.dtype for tensor in Ema(network().to(given), 0.9).tensors.values()} == {kept}


def test_an_average_begins_with_a_copy_of_the_weights() -> None:
    model = network()
    ema, before = Ema(model, 0.9), {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    drift(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.tensors.items())


def test_what_is_trained_is_averaged_once_and_nothing_else() -> None:
    model = network(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight = model[4].weight
    freeze(model, ["0.*"])
    assert list(Ema(model, 0.9).tensors) == ["2.weight", "2.bias", "3.weight", "3.bias", "4.bias", "5.weight", "5.bias"]


# -- in the place of the weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_has_the_average_for_a_while_and_then_its_own_bits(dtype: torch.dtype, fails: bool) -> None:
    model = network().to(dtype)
    ema = Ema(model, 0.9)
    drift(model)
    ema.update(model)
    with torch.no_grad():
        model[0].weight[0, :2] = torch.tensor([float("nan"), -0.0])
    before, tensors, places = bits(model), {n: t.clone() for n, t in ema.tensors.items()}, [*model.parameters()]
    addresses = [parameter.data_ptr() for parameter in places]

    def look() -> None:
        with ema.applied(model):
            assert all(torch.equal(p, tensors[name].to(dtype)) for name, p in model.named_parameters())
            assert [p.data_ptr() for p in model.parameters()] == addresses, "whoever holds a weight sees the average"
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            look()
    else:
        look()
    assert bits(model) == before
    assert all(own is other for own, other in zip(model.parameters(), places, strict=True))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in ema.tensors.items())


def test_evaluation_is_of_the_averaged_weights() -> None:
    trainer = averaged()
    trainer.fit([[samples()]] * 4, [Averaging()])
    other = trainer_of(network())
    other.state.model.load_state_dict(trainer.state.ema.tensors)
    before = bits(trainer.state.model)
    found = trainer.evaluate([[samples()]])
    assert found == other.evaluate([[samples()]])
    assert bits(trainer.state.model) == before
    trainer.state.ema = None
    assert found != trainer.evaluate([[samples()]])


def test_an_evaluation_that_fails_leaves_the_weights_as_they_were() -> None:
    trainer = averaged()
    trainer.fit([[samples()]] * 2, [Averaging()])
    before = bits(trainer.state.model)
    with pytest.raises(AttributeError):
        trainer.evaluate([[None]])
    assert bits(trainer.state.model) == before


def test_averages_and_evaluations_do_not_touch_training() -> None:
    class Evaluating(Averaging):
        def after_step(self, trainer: Any) -> None:
            super().after_step(trainer)
            trainer.evaluate([[samples()]] * 3)

    plain, watched = trainer_of(network(nn.Dropout(0.5))), averaged(0.9, nn.Dropout(0.5))
    plain.fit([[samples()]] * 5)
    watched.fit([[samples()]] * 5, [Evaluating()])
    assert torch.equal(weights(plain), weights(watched))


def test_a_rehearsal_is_not_averaged() -> None:
    trainer = averaged()
    before = {name: tensor.clone() for name, tensor in trainer.state.ema.tensors.items()}
    drift(trainer.state.model)
    trainer.rehearse([samples()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state.ema.tensors.items())


# -- in parts


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_are_averaged_as_shards(mesh: Any, dtype: torch.dtype) -> None:
    whole, sharded = network().to(dtype), network().to(dtype)
    for layer in (sharded[0], sharded[2]):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    averages = [Ema(model, 0.9) for model in (whole, sharded)]
    assert all(isinstance(tensor, DTensor) for tensor in averages[1].tensors.values())
    with torch.no_grad():
        for model, ema in zip((whole, sharded), averages, strict=True):
            for parameter in model.parameters():
                parameter.mul_(3)
            ema.update(model)

    def local(model: nn.Module) -> list[Tensor]:
        return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]

    own = local(sharded)
    with averages[0].applied(whole), averages[1].applied(sharded):
        assert all(torch.equal(one, other) for one, other in zip(local(whole), local(sharded), strict=True))
        assert not torch.equal(local(sharded)[0], own[0])
    assert all(torch.equal(one, other) for one, other in zip(local(sharded), own, strict=True))


# -- in a run

DECAY = 0.7


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(DIGITS)
    return tmp_path


def job_of(*overrides: str) -> Job:
    settings = [f"train.ema_decay={DECAY}", "checkpoint={every_steps: 1, keep: 99}", "train.device=cpu"]
    settings += ["eval={every_steps: 2}", "train.max_steps=6", "schedule=constant"]
    return load_job("digits.yaml", [*settings, *overrides], {})


def saved(job: Job, step: int) -> Any:
    """The state that a run has saved after a step."""
    trainer = session.build(job, ALONE, CPU).trainer
    Archive(f"{job.run.dir}/checkpoints").load(step, trainer.state)
    return trainer.state


def test_a_run_averages_after_every_step_and_evaluates_and_saves_the_result(folder: Path) -> None:
    job = job_of()
    session.train(job, ALONE)
    parts = session.build(job, ALONE, CPU)
    expected = {name: parameter.detach() for name, parameter in parts.trainer.state.model.named_parameters()}
    for step in range(1, 7):
        state = saved(job, step)
        for name, parameter in state.model.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * parameter.detach()
            torch.testing.assert_close(state.ema.tensors[name], expected[name])
    lines = [json.loads(line) for line in Path(job.run.dir, "metrics.jsonl").read_text().splitlines()]
    (told,) = (line["test/loss"] for line in lines if "test/loss" in line)
    parts.trainer.state.model.load_state_dict(expected)
    parts.trainer.state.ema = None
    assert told == pytest.approx(parts.trainer.evaluate([parts.test[i] for i in range(len(parts.test))])["loss"])
    assert evaluation.evaluate(job, job.run.dir)["test/loss"] == pytest.approx(told)


def test_a_resumed_average_is_that_of_an_undisturbed_run(folder: Path) -> None:
    whole, parted = job_of("run.dir=runs/whole"), job_of("run.dir=runs/parted")
    session.train(whole, ALONE)
    session.train(job_of("run.dir=runs/parted", "train.max_steps=3"), ALONE)
    session.train(parted, ALONE)
    one, other = saved(whole, 6).ema.tensors, saved(parted, 6).ema.tensors
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_two_ranks_evaluate_the_averages_of_one(workplace: Any) -> None:
    words = ["train", "digits.yaml", f"train.ema_decay={DECAY}", "train.max_steps=10", "train.precision=fp32"]
    for ranks in (1, 2):
        workplace.run(*words, f"run.dir=runs/{ranks}", f"launch.processes={ranks}", "train.device=cpu")
    one, two = (workplace.metrics(f"runs/{ranks}")[-1] for ranks in (1, 2))
    assert one["val/loss"] == pytest.approx(two["val/loss"], rel=1e-5)
    assert one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-5)


@pytest.mark.parametrize("decay", ["null", "0.9"])
def test_only_a_run_that_averages_has_an_observer_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decay: str
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, steps, observers, agreement: seen.append((trainer, observers)))
    session.train(job_of(f"train.ema_decay={decay}"), ALONE)
    ((trainer, observers),) = seen
    assert [isinstance(observer, Averaging) for observer in observers].count(True) == (decay != "null")
    assert isinstance(observers[0], Averaging) == (decay != "null")
    assert (trainer.state.ema is None) == (decay == "null")
