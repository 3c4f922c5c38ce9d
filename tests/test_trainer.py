"""The loop in a process of its own: gradients, clipping, precision, modes, rehearsal, and a loss that is lost."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from toolkit import distributed, session
from toolkit.agreement import Agreement
from toolkit.checkpoint import Archive, Checkpointer
from toolkit.config import Component, load_job
from toolkit.datasets.loader import Batch
from toolkit.distributed import ALONE, Ranks
from toolkit.lost import LostLossError
from toolkit.observers.checkpoints import Checkpoints
from toolkit.observers.evaluation import Evaluation
from toolkit.optim import build_optimizer, freeze
from toolkit.tasks import Classification
from toolkit.trainer import Trainer

CPU = torch.device("cpu")
SAMPLES, CLASSES = 24, 3


def samples(first: int = 0, last: int = SAMPLES) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 5, generator=generator)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return Batch(inputs[first:last], targets[first:last], np.arange(first, last))


def micro_batches(*sizes: int) -> list[Batch]:
    ends = np.cumsum(sizes)
    return [samples(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def network(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *extra, nn.Linear(8, CLASSES))


def trainer_of(model: nn.Module, task: Any = None, lr: float = 0.1, **options: Any) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    settings = {"device": CPU, "total_steps": 6, "global_batch_size": SAMPLES} | options
    return Trainer(model, task or Classification(), optimizer, lambda step: 1.0, **settings)


def gradient(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters if parameter.grad is not None])


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


@pytest.mark.parametrize("sizes", [(12, 12), (7, 7, 7, 3), (1,) * SAMPLES])
def test_accumulated_gradients_are_those_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    model = network()
    F.cross_entropy(model(samples().input), samples().target).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    trainer = trainer_of(network())
    trainer.backward(micro_batches(*sizes))
    torch.testing.assert_close(gradient(trainer), expected, rtol=1e-5, atol=1e-7)


class Weighted:
    """Sample i counts i % 4 times."""

    def __init__(self) -> None:
        self.seen = 0

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weight = (torch.arange(self.seen, self.seen + len(target)) % 4).float()
        self.seen = (self.seen + len(target)) % SAMPLES
        return F.cross_entropy(output, target, reduction="none"), weight


@pytest.mark.parametrize("sizes", [(24,), (5, 5, 5, 5, 4)])
def test_weighted_losses_give_the_weighted_mean_of_the_global_batch(sizes: tuple[int, ...]) -> None:
    model = network()
    weight = (torch.arange(SAMPLES) % 4).float()
    losses = F.cross_entropy(model(samples().input), samples().target, reduction="none")
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    trainer = trainer_of(network(), Weighted())
    trainer.backward(micro_batches(*sizes))
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(gradient(trainer), expected, rtol=1e-5, atol=1e-7)
    assert trainer.mean_loss() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_whole_gradient_is_clipped_to_the_norm(precision: str) -> None:
    free = trainer_of(network())
    free.backward([samples()])
    trainer = trainer_of(network(), lr=1.0, clip_grad_norm=0.01, precision=precision)
    before = weights(trainer)
    trainer.step([samples()])
    assert (weights(trainer) - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert trainer.interval.norms[-1].item() == pytest.approx(gradient(free).norm().item(), rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_computes_in_low_precision_and_keeps_weights_in_full(precision: str) -> None:
    seen: list[torch.dtype] = []
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer, full = trainer_of(model, precision=precision), trainer_of(network())
    trainer.fit([[samples()]] * 6)
    full.fit([[samples()]] * 6)
    trainer.evaluate([[samples()]])
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16] * 7
    assert weights(trainer).dtype == torch.float32
    torch.testing.assert_close(weights(trainer), weights(full), rtol=0.05, atol=0.01)
    assert not torch.equal(weights(trainer), weights(full))


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows() -> None:
    trainer = trainer_of(network(), precision="fp16")
    scale, before = trainer.state.scaler.get_scale(), weights(trainer)
    trainer.backward([samples()])
    unscaled = trainer_of(network())
    unscaled.backward([samples()])
    torch.testing.assert_close(gradient(trainer) / scale, gradient(unscaled), rtol=0.05, atol=1e-3)
    trainer.state.optimizer.zero_grad()

    huge = samples()
    trainer.step([huge._replace(input=huge.input * 1e30)])
    assert torch.equal(weights(trainer), before)
    assert trainer.state.scaler.get_scale() == scale / 2
    trainer.step([samples()])
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_scale_nothing(precision: str) -> None:
    assert not trainer_of(network(), precision=precision).state.scaler.is_enabled()


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.training_seen: list[bool] = []
        self.inference_seen: list[bool] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.training_seen.append(self.training)
        self.inference_seen.append(torch.is_inference_mode_enabled())
        return inputs


def test_training_trains_and_evaluation_evaluates_without_a_graph() -> None:
    recorder = Recorder()
    trainer = trainer_of(network(recorder))
    trainer.model.eval()  # as a loop of one's own may have left it
    trainer.fit([[samples()]] * 2)
    trainer.evaluate([[samples()], [samples()]])
    trainer.fit([[samples()]])
    assert recorder.training_seen == [True, True, False, False, True]
    assert recorder.inference_seen == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("precision", "eval_precision", "trained_in", "evaluated_in"),
    [
        ("bf16", None, torch.bfloat16, torch.bfloat16),
        ("bf16", "fp32", torch.bfloat16, torch.float32),
        ("fp32", "fp16", torch.float32, torch.float16),
    ],
)
def test_evaluation_has_a_precision_of_its_own_or_that_of_training(
    precision: str, eval_precision: str | None, trained_in: torch.dtype, evaluated_in: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer = trainer_of(model, precision=precision, eval_precision=eval_precision)
    for _ in range(2):
        trainer.fit([[samples()]])
        trainer.evaluate([[samples()]])
    assert seen == [trained_in, evaluated_in] * 2
    assert trainer.state.scaler.is_enabled() == (precision == "fp16")


class Drawing(nn.Module):
    """Draws from every global generator, in training and in evaluation, as code of one's own may."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * torch.rand(()) + random.random() + float(np.random.rand())


def test_an_evaluation_does_not_shift_what_training_draws() -> None:
    plain, evaluated = trainer_of(network(Drawing())), trainer_of(network(Drawing()))
    plain.fit([[samples()]] * 5)
    for step in range(5):
        evaluated.step(micro_batches(SAMPLES))
        evaluated.evaluate([[samples()]] * step)
    assert torch.equal(weights(plain), weights(evaluated))


def test_evaluation_is_exact_over_uneven_batches() -> None:
    trainer = trainer_of(network())
    found = trainer.evaluate([[batch] for batch in micro_batches(9, 9, 5, 1)])
    output = trainer.model(samples().input)
    assert found["accuracy"] == (output.argmax(1) == samples().target).sum().item() / SAMPLES
    assert found["loss"] == pytest.approx(F.cross_entropy(output, samples().target).item(), rel=1e-6)


def frozen_part(*extra: nn.Module) -> nn.Module:
    """A network that begins with a frozen part, and goes on with a batch norm that is trained."""
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), *extra), *network(nn.BatchNorm1d(8)))
    freeze(model, ["0.*"])
    return model


def test_frozen_means_that_nothing_changes_buffers_included() -> None:
    model = frozen_part(nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), spectral_norm(nn.Linear(5, 5)))
    optimizer = build_optimizer(model, Component(name="adamw", args={"lr": 0.1, "weight_decay": 0.1}), CPU)
    settings = {"device": CPU, "total_steps": 6, "global_batch_size": SAMPLES}
    trainer = Trainer(model, Classification(), optimizer, lambda step: 1.0, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.rehearse([samples()])
    trainer.fit([[samples()]] * 2)
    trainer.evaluate([[samples()]])
    trainer.step([samples()])  # an evaluation must not thaw it
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("0.")}


def test_a_frozen_batch_norm_normalises_as_in_evaluation_and_dropout_still_drops() -> None:
    trainer = trainer_of(frozen_part(nn.BatchNorm1d(5), nn.Dropout(0.5)))
    trainer.fit([[samples()]])
    linear, norm, dropout = trainer.state.model[0]
    assert (linear.training, norm.training, dropout.training) == (True, False, True)
    assert trainer.state.model[3].training


def test_a_frozen_batch_norm_takes_a_single_sample_in_rehearsal_and_in_training() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), nn.Linear(5, CLASSES))
    freeze(model, ["0.*"])
    trainer = trainer_of(model)
    trainer.rehearse(micro_batches(1))  # one in training mode would refuse it
    trainer.fit([micro_batches(1)])


def test_a_batch_norm_beside_frozen_weights_keeps_learning() -> None:
    model = network(nn.BatchNorm1d(8))
    freeze(model, ["0.*", "2.bias"])
    trainer = trainer_of(model)
    trainer.fit([[samples()]])
    assert model[2].running_mean.abs().sum() > 0


def test_a_trainer_in_a_loop_of_ones_own_has_the_place_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "current", lambda: Ranks(1, 2))
    trainer = trainer_of(network())
    trainer.backward([samples()])
    assert trainer.ranks == Ranks(1, 2)
    monkeypatch.undo()
    alone = trainer_of(network())
    alone.backward([samples()])
    torch.testing.assert_close(gradient(trainer), 2 * gradient(alone))  # by which DDP divides


def test_a_job_freezes_before_the_optimizer_is_built(workplace: Any) -> None:
    job = load_job(str(workplace.folder / "digits.yaml"), ["train.freeze=['layers.1.*']"], {})
    trainer = session.build(job, ALONE, CPU).trainer
    trained = {name for name, parameter in trainer.state.model.named_parameters() if parameter.requires_grad}
    assert trained == {"layers.3.weight", "layers.3.bias"}
    held = [parameter for group in trainer.state.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(trainer.parameters) == 2


def test_a_rehearsal_leaves_no_trace() -> None:
    plain, rehearsed = (trainer_of(network(nn.BatchNorm1d(8), nn.Dropout(0.5))) for _ in range(2))
    for trainer in (plain, rehearsed):
        trainer.fit([[samples()]] * 2)
    before = {name: tensor.clone() for name, tensor in rehearsed.state.model.state_dict().items()}
    optimizer = [tensor.clone() for state in rehearsed.state.optimizer.state.values() for tensor in state.values()]
    rehearsed.rehearse(micro_batches(20, 4))

    assert all(torch.equal(tensor, before[name]) for name, tensor in rehearsed.state.model.state_dict().items())
    now = [tensor for state in rehearsed.state.optimizer.state.values() for tensor in state.values()]
    assert len(optimizer) == len(now)
    assert all(torch.equal(one, other) for one, other in zip(now, optimizer, strict=True))
    assert rehearsed.state.step == 2
    assert all(parameter.grad is None for parameter in rehearsed.parameters)

    for trainer in (plain, rehearsed):
        trainer.interval.restart()
        trainer.step([samples()])
    assert torch.equal(weights(plain), weights(rehearsed)), "its random numbers were those of the step itself"
    assert plain.mean_loss() == rehearsed.mean_loss()


def test_a_rehearsed_loss_is_not_reported() -> None:
    trainer = trainer_of(network())
    trainer.rehearse([samples()])
    assert trainer.interval.steps == 0
    assert trainer.mean_loss() == 0


def test_fit_stops_where_the_ranks_agree_and_tells_the_observers() -> None:
    told: list[Any] = []

    class Observer:
        def start(self, trainer: Trainer) -> None:
            told.append("start")

        def after_step(self, trainer: Trainer) -> None:
            told.append((trainer.state.step, set(trainer.agreed)))

        def end(self, trainer: Trainer) -> None:
            told.append("end")

    trainer = trainer_of(network())
    trainer.fit([[samples()]] * 6, [Observer()], Agreement(ALONE, {"stop": lambda: trainer.state.step == 2}))
    assert told == ["start", (1, set()), (2, {"stop"}), "end"]
    assert not trainer.finished


def test_a_stop_before_the_first_step_takes_none() -> None:
    trainer, before = trainer_of(network()), weights(trainer_of(network()))
    trainer.fit([[samples()]] * 6, (), Agreement(ALONE, {"stop": lambda: True}))
    assert trainer.state.step == 0
    assert torch.equal(weights(trainer), before)


def test_a_stop_breaks_an_evaluation_off_and_the_next_start_makes_up_for_it() -> None:
    trainer, taken, reported = trainer_of(network()), list[int](), {1: ["train/loss"], 2: ["train/loss", "val/loss"]}

    def val() -> Iterator[list[Batch]]:
        for number in range(5):
            taken.append(number)
            yield [samples()]

    observers = [Evaluation(lambda step: True, val, None, lambda step: reported.get(step, []))]
    trainer.fit([[samples()]] * 6, observers, Agreement(ALONE, {"stop": lambda: len(taken) == 3}))
    assert taken == [0, 1, 2], "not one batch more"
    assert (trainer.state.step, trainer.report) == (1, {})

    trainer.agreed = frozenset()
    observers[0].start(trainer)
    assert trainer.report.keys() == {"val/accuracy", "val/loss"}
    for step in (2, 3):  # what is reported is not owed, and where there is no line there was no evaluation
        trainer.state.step, trainer.report = step, {}
        observers[0].start(trainer)
        assert trainer.report == {}


@pytest.mark.parametrize(("every_steps", "saved"), [(1, [1, 2]), (2, [2])])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_lost_loss_ends_the_run_and_is_never_saved(
    tmp_path: Path, every_steps: int, saved: list[int], loss: float
) -> None:
    class LostInStepThree(Classification):
        calls = 0

        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return super().loss(output, target) * (loss if self.calls == 3 else 1)

    class AfterSaves:
        def start(self, trainer: Trainer) -> None: ...

        def after_step(self, trainer: Trainer) -> None:
            if trainer.state.step % every_steps == 0:
                trainer.interval.restart()

        def end(self, trainer: Trainer) -> None: ...

    checkpointer = Checkpointer(Archive(str(tmp_path / "checkpoints")))
    saves = Checkpoints(checkpointer, every_steps)
    trainer = trainer_of(network(), LostInStepThree())
    with pytest.raises(LostLossError) as lost:
        trainer.fit([[samples()]] * 6, [saves, AfterSaves()])
    checkpointer.wait()
    assert checkpointer.archive.steps() == saved
    assert lost.value.steps == range(2, 3)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_job_decides_whether_the_model_is_compiled(
    monkeypatch: pytest.MonkeyPatch, workplace: Any, wanted: bool
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *args, **options: compiled.append(module))
    job = load_job(str(workplace.folder / "digits.yaml"), [f"train.compile={str(wanted).lower()}"], {})
    parts = session.build(job, ALONE, CPU)
    assert compiled == ([parts.trainer.state.model] if wanted else [])


@pytest.mark.parametrize(("precision", "enabled"), [("auto", False), ("fp32", False), ("fp16", True)])
def test_auto_precision_is_full_on_a_cpu(workplace: Any, precision: str, enabled: bool) -> None:
    job = load_job(str(workplace.folder / "digits.yaml"), [f"train.precision={precision}"], {})
    trainer = session.build(job, ALONE, CPU).trainer
    assert trainer.state.scaler.is_enabled() == enabled


@pytest.mark.parametrize(
    ("precision", "dtype"), [("null", torch.bfloat16), ("auto", torch.float32), ("fp16", torch.float16)]
)
def test_the_job_says_in_which_precision_to_evaluate(workplace: Any, precision: str, dtype: torch.dtype) -> None:
    words = ["train.precision=bf16", f"eval.precision={precision}"]
    job = load_job(str(workplace.folder / "digits.yaml"), words, {})
    parts = session.build(job, ALONE, CPU)
    seen: set[torch.dtype] = set()
    parts.trainer.state.model.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    parts.trainer.evaluate([parts.test[0]])
    assert seen == {dtype}
