"""What optimizers keep in their groups of parameters: it goes through a save like all else that they remember."""

from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.states import all_of, save, silent
from toolkit.checkpoint import Archive, Checkpointer, state
from toolkit.errors import RunError
from toolkit.trainer import State


class Averaging(torch.optim.Optimizer):
    """Its steps grow with a count that it keeps in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.5, limit: float = inf) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "limit": limit, "count": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            group["weight_sum"] += group["beta"] ** group["count"]
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] * min(group["weight_sum"], group["limit"]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def state_of(*groups: dict[str, Any], **args: Any) -> State:
    """A state of a run; `groups` have parts of the network by number."""
    model = network()
    params = [group | {"params": [*model[group["params"]].parameters()]} for group in groups] or model.parameters()
    return State(model, Averaging(params, **args), torch.amp.GradScaler("cpu", enabled=False))


def trained(state: Any, steps: int) -> Any:
    for _ in range(steps):
        state.model(torch.full((1, 2), state.step + 1.0)).sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
    return state


def resumed(url: str, state: Any) -> Any:
    assert Checkpointer(Archive(url)).resume(state, silent) == state.step
    return state


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


def test_what_an_optimizer_counts_goes_on_as_if_undisturbed(url: str) -> None:
    save(url, trained(state_of(), 3))
    assert all_of(trained(resumed(url, state_of()), 3)) == all_of(trained(state_of(), 6))


def test_who_goes_back_to_the_start_counts_from_there(url: str) -> None:
    save(url, state_of())
    assert all_of(trained(resumed(url, trained(state_of(), 3)), 2)) == all_of(trained(state_of(), 2))


def test_a_loop_of_ones_own_has_its_learning_rate_and_momentum_back(url: str) -> None:
    def new(lr: float = 0.4) -> Any:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        return SimpleNamespace(model=model, optimizer=optimizer, step=0)

    saved, loaded = new(), new()
    schedule = torch.optim.lr_scheduler.OneCycleLR(saved.optimizer, max_lr=1.0, total_steps=9)
    for _ in range(3):
        trained(saved, 1)
        schedule.step()
    save(url, saved)
    (before,), (after,) = saved.optimizer.param_groups, resumed(url, loaded).optimizer.param_groups
    assert {key: after[key] for key in before if key != "params"} == {
        key: value for key, value in before.items() if key != "params"
    }
    assert before["betas"] != loaded.optimizer.defaults["betas"]
    assert all_of(loaded) == all_of(saved)
    assert resumed(url, new(lr=0.7)).optimizer.param_groups[0]["lr"] == 0.7, "the loop names another"


def test_where_the_job_names_another_value_the_job_wins_and_what_was_counted_stays(url: str) -> None:
    save(url, trained(state_of({"params": 0, "beta": 0.25}, {"params": 1}), 3))
    loaded = resumed(url, state_of({"params": 0, "beta": 0.125}, {"params": 1}, beta=0.75, lr=0.2))
    found = [[group[key] for key in ("count", "beta", "lr", "limit")] for group in loaded.optimizer.param_groups]
    assert found == [[3, 0.125, 0.2, inf], [3, 0.75, 0.2, inf]]


def test_groups_may_be_parted_and_joined_where_all_that_is_one_now_was_equal(url: str) -> None:
    save(url, trained(state_of(), 3))
    parted = resumed(url, state_of({"params": 0}, {"params": 1}))
    assert [group["count"] for group in parted.optimizer.param_groups] == [3, 3]
    save(url, trained(parted, 1))
    assert resumed(url, state_of()).optimizer.param_groups[0]["count"] == 4
    parted.optimizer.param_groups[1]["count"] = 7
    save(url, trained(parted, 1))
    words = r"does not fit the job:\n  optimizer value 'count' was 5 for 0.weight, 8 for 1.weight, which are one group"
    with pytest.raises(RunError, match=words):
        resumed(url, state_of())


def test_a_checkpoint_that_is_older_than_groups_is_loaded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "to_groups", lambda *_: [])
    save(url, trained(state_of(), 3))
    assert b'"groups"' not in next(Path(url).rglob("state-*")).read_bytes()
    loaded = resumed(url, trained(state_of(beta=0.25), 1))
    assert (loaded.step, loaded.optimizer.param_groups[0]["count"]) == (3, 1)


@pytest.mark.parametrize(
    ("value", "words"), [(torch.ones(2), "a Tensor"), (inf, "inf"), ({"a": 1}, "a dict"), ([[1]], "a list")]
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(url: str, value: Any, words: str) -> None:
    changed = state_of()
    changed.optimizer.param_groups[0]["history"] = changed.optimizer.defaults["history"] = value
    if value is inf:
        del changed.optimizer.defaults["history"]
    with pytest.raises(RunError, match=rf"optimizer value 'history' of the group of 0.weight is {words}; only plain"):
        save(url, changed)
    assert not Path(url).exists()


def test_a_list_that_is_changed_in_place_comes_back(url: str) -> None:
    def new() -> State:
        made = state_of()
        made.optimizer.defaults["history"] = made.optimizer.param_groups[0]["history"] = [0.5]
        return made

    saved = new()
    saved.optimizer.param_groups[0]["history"] += [1, "two", None, True]
    save(url, saved)
    assert resumed(url, new()).optimizer.param_groups[0]["history"] == [0.5, 1, "two", None, True]


def test_a_tensor_of_one_number_comes_back_as_one(url: str) -> None:
    def new() -> Any:
        model = network()
        return SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1)), step=1)

    saved, fresh = new(), new()
    saved.optimizer.param_groups[0]["lr"].fill_(0.3)
    save(url, saved)
    assert torch.equal(resumed(url, fresh).optimizer.param_groups[0]["lr"], torch.tensor(0.3))


def test_learning_rates_that_a_schedule_sets_are_those_of_the_job(url: str) -> None:
    lr = torch.tensor(0.1)  # as capturable optimizers have it
    model: Any = network()
    saved = State(model, torch.optim.SGD(model.parameters(), lr=lr), torch.amp.GradScaler("cpu", enabled=False))
    saved.optimizer.param_groups[0]["initial_lr"] = lr
    save(url, saved)
    resumed(url, saved)
    assert isinstance(saved.optimizer.param_groups[0]["lr"], Tensor)
