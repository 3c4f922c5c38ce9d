"""Optimizers as the job names them, and schedules as functions of the step."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.config.schema import Component
from toolkit.datasets.loader import Batch
from toolkit.errors import JobError
from toolkit.models.cnn import Cnn
from toolkit.models.gpt import Gpt
from toolkit.optim import build_optimizer, build_schedule, freeze
from toolkit.tasks import Regression
from toolkit.trainer import Trainer

CPU = torch.device("cpu")
TOTAL, WARM = 110, 10


class Plain(torch.optim.Optimizer):
    """A user's own: neither weight_decay nor fused."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


class Fused(Plain):
    """A user's own, with both."""

    def __init__(self, params: Any, lr: float = 0.5, weight_decay: float = 0.1, fused: bool = False) -> None:
        super().__init__(params, lr)
        self.fused, self.weight_decay = fused, weight_decay


def falling(step: int, total_steps: int, power: int = 1) -> float:
    """A user's own schedule."""
    return (1 - step / total_steps) ** power


def scaled(model: nn.Module, lr_scale: dict[str, float], **args: Any) -> Any:
    return build_optimizer(model, Component(name="adamw", args={"lr": 0.1} | args), CPU, lr_scale)


def broken(step: int, total_steps: int) -> float:
    """A user's own, with a mistake."""
    return total_steps / step


def at(now: int, total_steps: int, step: int, value: float | None) -> float | None:
    """A user's own, which is 1 but at one step."""
    return value if now == step else 1.0


def optimizer_of(name: str, model: nn.Module, **args: Any) -> Any:
    return build_optimizer(model, Component(name=name, args=args), CPU)


def schedule_of(name: str, **args: Any) -> Any:
    return build_schedule(Component(name=name, args=args), TOTAL)


class Unannotated(torch.optim.Optimizer):
    """A user's own."""

    def __init__(self, params, lr, betas=(0.9, 0.99)):  # type: ignore[no-untyped-def]
        super().__init__(params, {"lr": lr, "betas": betas})


def test_a_list_of_the_job_file_is_a_tuple_as_python_has_it() -> None:
    optimizer = optimizer_of(f"{__name__}:Unannotated", nn.Linear(2, 2), lr=0.1, betas=[0.9, 0.95])
    assert [one["betas"] for one in (optimizer.defaults, *optimizer.param_groups)] == [(0.9, 0.95)] * (
        1 + len(optimizer.param_groups)
    )


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    "model", [Cnn((1, 8, 8), 10, width=4), Gpt(50, (16,), layers=1, heads=2, width=8)], ids=["cnn", "gpt"]
)
def test_weight_decay_spares_norms_and_biases_and_nothing_else(name: str, model: nn.Module) -> None:
    groups = optimizer_of(name, model, lr=0.1, weight_decay=0.3).param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    spared = {named: decay[parameter] == 0 for named, parameter in model.named_parameters()}
    kinds = (nn.BatchNorm2d, nn.LayerNorm)
    norms = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, kinds)}
    assert spared == {named: named.endswith("bias") or named in norms for named in spared}
    assert set(decay.values()) == {0.0, 0.3}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    groups = optimizer_of("adamw", model, lr=0.1).param_groups
    assert {parameter for group in groups for parameter in group["params"]} == set(model[1].parameters())


class Layers(nn.Module):
    """Parameters with dotted names; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ([], ""),
        (["layers.0.*"], "layers.0.weight layers.0.bias"),
        (["layers.[12].bias", "head.bias"], "layers.1.bias layers.2.bias head.bias"),
        (["layers.*", "layers.0.*"], "layers.0.weight layers.0.bias layers.1.weight layers.1.bias layers.2.weight "
         "layers.2.bias"),
        (["head.weight"], "embed.weight"),
    ],
)  # fmt: skip
def test_patterns_freeze_what_they_match_and_nothing_else(patterns: list[str], frozen: str) -> None:
    model = Layers()
    freeze(model, patterns)
    found = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert found == set(frozen.split())


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("layer.0.*", "did you mean 'layers.0.*'?"),
        ("layers.0", "did you mean 'layers.0.*'?"),
        ("embd.weight", "did you mean 'embed.weight'?"),
        ("Layers.0.*", "did you mean 'layers.0.*'?"),
        ("zzz", "parameters; Their names:"),
    ],
)
def test_a_pattern_that_freezes_nothing_is_refused_with_the_names_there_are(pattern: str, meant: str) -> None:
    with pytest.raises(JobError) as error:
        freeze(Layers(), ["layers.*", pattern])
    message = str(error.value)
    assert message.startswith(f"train.freeze: {pattern!r} matches none of the model's 9 parameters; ")
    assert meant in message
    names = "embed.weight, layers.0.weight, layers.0.bias, layers.1.weight, layers.1.bias and 4 more"
    assert message.endswith(f"Their names: {names}")


@pytest.mark.parametrize(
    ("lr_scale", "factors"),
    [
        ({}, {}),
        ({"head.*": 10, "layers.0.*": 0.5}, {"embed.weight": 10, "head.bias": 10, "layers.0.weight": 0.5,
                                             "layers.0.bias": 0.5}),
        ({"*.bias": 2}, {"layers.0.bias": 2, "layers.1.bias": 2, "layers.2.bias": 2, "head.bias": 2}),
    ],
)  # fmt: skip
def test_learning_rates_are_scaled_by_pattern_and_nothing_else_is(
    lr_scale: dict[str, float], factors: dict[str, float]
) -> None:
    model = Layers()
    groups = scaled(model, lr_scale, weight_decay=0.3).param_groups
    found = {
        parameter: (group["initial_lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    for name, parameter in model.named_parameters():
        decay = 0.0 if name.endswith("bias") else 0.3
        assert found[parameter] == (pytest.approx(0.1 * factors.get(name, 1)), decay), name
    assert groups[0]["initial_lr"] == 0.1, "the one that metrics report is the job's"


def test_a_scaled_part_takes_the_steps_of_an_optimizer_with_that_learning_rate() -> None:
    inputs, ends = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)), []
    for lr, lr_scale in ((0.1, {"0.*": 0.1}), (0.01, {"1.*": 10.0})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        optimizer = scaled(model, lr_scale, lr=lr)
        trainer = Trainer(
            model, Regression(), optimizer, lambda step: 0.5, device=CPU, total_steps=3, global_batch_size=8
        )
        for _ in range(3):
            trainer.step([Batch(inputs, torch.ones(8), np.arange(8))])
        ends.append([*model.state_dict().values()])
    assert all(torch.allclose(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("lr_scale", "words"),
    [
        ({"layer.0.*": 2.0}, "optimizer.lr_scale: 'layer.0.*' matches none of the model's 8 trainable parameters; "
                             "did you mean 'layers.0.*'? Their names: embed.weight, "),
        ({"layers.2.bias": 2.0}, "'layers.2.bias' matches none of the model's 8 trainable parameters"),
        ({"*": 0.1, "head.*": 10.0}, "optimizer.lr_scale: head.weight matches '*' and 'head.*'; change one"),
        ({"embed.*": 2.0, "head.*": 10.0}, "head.weight matches 'embed.*' and 'head.*'"),
    ],
    ids=["no match", "frozen", "two patterns", "tied"],
)  # fmt: skip
def test_a_pattern_that_scales_nothing_or_something_twice_is_refused(lr_scale: dict[str, float], words: str) -> None:
    model = Layers()
    freeze(model, ["layers.2.bias"])
    with pytest.raises(JobError) as error:
        scaled(model, lr_scale)
    assert words in str(error.value)


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(JobError, match=r"train\.freeze: \*\.weight, \*\.bias leaves no parameter"):
        freeze(Layers(), ["*.weight", "*.bias"])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_one_fused_kernel_is_used_unless_the_job_says_otherwise(name: str) -> None:
    model = nn.Linear(2, 2)
    assert all(group["fused"] for group in optimizer_of(name, model, lr=0.1).param_groups)
    assert not any(group["fused"] for group in optimizer_of(name, model, lr=0.1, fused=False).param_groups)
    for group in optimizer_of(name, model, lr=0.1, foreach=True).param_groups:
        assert (bool(group["foreach"]), bool(group["fused"])) == (True, False)


def test_fused_and_plain_adamw_take_the_same_steps() -> None:
    models = []
    for options in ({}, {"fused": False}):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = optimizer_of("adamw", model, lr=0.01, weight_decay=0.1, **options)
        for _ in range(5):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    torch.testing.assert_close(models[0].weight, models[1].weight)


@pytest.mark.parametrize(("kind", "groups"), [(Plain, 1), (Fused, 2)])
def test_an_own_optimizer_gets_only_what_it_names(kind: type[Plain], groups: int) -> None:
    model = nn.Linear(2, 2)
    optimizer = optimizer_of(f"{__name__}:{kind.__name__}", model, lr=0.25)
    assert isinstance(optimizer, kind)
    assert getattr(optimizer, "fused", None) is (True if kind is Fused else None)
    assert len(optimizer.param_groups) == groups
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.25)


def test_every_group_keeps_the_rate_that_schedules_multiply() -> None:
    optimizer = optimizer_of("sgd", nn.Linear(2, 2), lr=0.25)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [("adamv", {}, "did you mean 'adam"), ("adamw", {"rl": 1}, "unknown argument 'rl'"), ("sgd", {"lr": "x"}, "'lr'")],
)
def test_a_wrong_optimizer_is_refused_in_words(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        optimizer_of(name, nn.Linear(2, 2), **args)


@pytest.mark.parametrize(
    ("name", "args", "at"),
    [
        ("constant", {}, {0: 1, 55: 1, 110: 1}),
        ("constant", {"warmup_steps": WARM}, {0: 1 / 11, 9: 10 / 11, 10: 1, 60: 1, 110: 1}),
        ("linear", {}, {0: 1, 55: 0.5, 110: 0}),
        ("linear", {"warmup_steps": WARM}, {0: 1 / 11, 9: 10 / 11, 10: 1, 60: 0.5, 109: 0.01, 110: 0}),
        ("linear", {"warmup_steps": WARM, "final": 0.2}, {10: 1, 60: 0.6, 110: 0.2}),
        ("cosine", {}, {0: 1, 55: 0.5, 110: 0}),
        ("cosine", {"warmup_steps": WARM}, {0: 1 / 11, 9: 10 / 11, 10: 1, 35: 0.853553, 60: 0.5, 85: 0.146447, 110: 0}),
        ("cosine", {"warmup_steps": WARM, "final": 0.2}, {10: 1, 60: 0.6, 110: 0.2}),
        ("cosine", {"warmup_steps": TOTAL}, {0: 1 / 111, 109: 110 / 111}),
        ("cosine_restarts", {"period_steps": 40}, {0: 1, 20: 0.5, 39: 0.001541, 40: 1, 60: 0.5, 80: 1}),
        ("cosine_restarts", {"period_steps": 10, "growth": 2}, {0: 1, 5: 0.5, 10: 1, 20: 0.5, 30: 1, 50: 0.5, 70: 1}),
        (
            "cosine_restarts",
            {"period_steps": 20, "warmup_steps": WARM, "final": 0.2},
            {0: 1 / 11, 10: 1, 20: 0.6, 30: 1},
        ),
        ("one_cycle", {}, {0: 0.04, 16: 0.52, 32: 1, 109: 4e-6}),
        ("one_cycle", {"rise": 0.1, "initial": 0.5, "final": 0.1}, {0: 0.5, 5: 0.75, 10: 1, 109: 0.1}),
        ("wsd", {}, {0: 1, 88: 1, 99: 1 - 0.5**0.5, 110: 0}),
        ("wsd", {"warmup_steps": WARM, "shape": "linear"}, {0: 1 / 11, 9: 10 / 11, 10: 1, 88: 1, 99: 0.5, 110: 0}),
        ("wsd", {"decay": 0.5, "final": 0.2}, {0: 1, 55: 1, 82.5: 0.2 + 0.8 * (1 - 0.5**0.5), 110: 0.2}),
        (f"{__name__}:falling", {"power": 2}, {0: 1, 55: 0.25, 110: 0}),
    ],
)
def test_a_schedule_has_these_values(name: str, args: dict[str, Any], at: dict[int, float]) -> None:
    schedule = schedule_of(name, **args)
    assert {step: schedule(step) for step in at} == pytest.approx(at, abs=1e-6)


def rates(scheduler: Any) -> list[float]:
    """The factors that a scheduler of torch gives a learning rate of 1."""
    found = []
    for _ in range(TOTAL):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("options", [{}, {"pct_start": 0.11, "div_factor": 3.0, "final_div_factor": 50.0}])
def test_one_cycle_is_that_of_torch(options: dict[str, float]) -> None:
    settings = {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4} | options
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 1.0, TOTAL, cycle_momentum=False, **options
    )
    initial = 1 / settings["div_factor"]
    schedule = schedule_of(
        "one_cycle", rise=settings["pct_start"], initial=initial, final=initial / settings["final_div_factor"]
    )
    assert [schedule(step) for step in range(TOTAL)] == pytest.approx(rates(theirs), abs=1e-12)


@pytest.mark.parametrize(("period", "growth"), [(7, 1), (7, 2), (3, 3), (TOTAL, 1)])
def test_cosine_restarts_are_those_of_torch(period: int, growth: int) -> None:
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), T_0=period, T_mult=growth, eta_min=0.125
    )
    schedule = schedule_of("cosine_restarts", period_steps=period, growth=growth, final=0.125)
    assert [schedule(step) for step in range(TOTAL)] == pytest.approx(rates(theirs), abs=1e-12)


def test_until_its_decay_wsd_knows_nothing_of_the_length_of_the_run() -> None:
    short, long = (build_schedule(Component(name="wsd", args={"warmup_steps": WARM}), n) for n in (TOTAL, 10 * TOTAL))
    assert [short(step) for step in range(88)] == [long(step) for step in range(88)]
    assert long(879) == 1 > long(881)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["one_cycle", "wsd", "linear", "cosine"])
def test_the_shortest_runs_have_factors_too(name: str, total_steps: int) -> None:
    schedule = build_schedule(Component(name=name), total_steps)
    assert all(0 <= schedule(step) <= 1 for step in range(total_steps))


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("one_cycle", {"rise": 1.0}, "'one_cycle': argument 'rise' is 1.0; it must be less than 1"),
        ("wsd", {"decay": 0.0}, "'wsd': argument 'decay' is 0.0; it must be greater than 0"),
        ("wsd", {"shape": "cosine"}, "argument 'shape' is 'cosine'; it must be 'sqrt' or 'linear'"),
        ("cosine_restarts", {"period_steps": 0}, "argument 'period_steps' is 0; it must be greater than or equal to 1"),
        ("cosine_restarts", {}, "argument 'period_steps' is missing"),
        (f"{__name__}:falling", {"power": "2"}, "argument 'power' is '2'"),
        (f"{__name__}:broken", {}, "at step 0 raised ZeroDivisionError"),
        *[(name, {"warmup_steps": -5}, "'warmup_steps' is -5") for name in ("constant", "linear", "cosine", "wsd")],
        *[(name, {"final": -3}, "'final' is -3") for name in ("linear", "cosine", "one_cycle", "wsd")],
        ("cosine_restarts", {"period_steps": 7, "growth": 0, "final": -1}, "'growth' is 0(.|\n)*'final' is -1"),
        (f"{__name__}:at", {"step": 0, "value": None}, "at step 0 is None; the factor of a learning rate must be"),
        (f"{__name__}:at", {"step": TOTAL // 2, "value": -0.5}, f"at step {TOTAL // 2} is -0.5"),
        (f"{__name__}:at", {"step": TOTAL - 1, "value": 1e999}, f"at step {TOTAL - 1} is inf"),
    ],
)
def test_a_schedule_that_could_not_work_is_refused(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        schedule_of(name, **args)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_the_warm_up_rises_at_every_step_and_the_rest_never_does(name: str) -> None:
    factors = [schedule_of(name, warmup_steps=WARM)(step) for step in range(TOTAL)]
    assert all(before < after for before, after in pairwise(factors[: WARM + 1]))
    assert all(before >= after for before, after in pairwise(factors[WARM:]))
    assert 0 < min(factors) < max(factors) == 1


def test_a_wrong_argument_of_a_schedule_is_refused_in_words() -> None:
    with pytest.raises(JobError, match="unknown argument 'warmup'; did you mean 'warmup_steps'"):
        schedule_of("cosine", warmup=3)
