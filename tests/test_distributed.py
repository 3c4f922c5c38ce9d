"""Who a process is among the ranks, and how often the ranks ask each other. No process group is needed for either."""

from types import SimpleNamespace
from typing import Any

import pytest

from toolkit import distributed
from toolkit.distributed import ALONE, Agreement, Ranks, ranks_from
from toolkit.errors import JobError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500", "HOME": "/"}])
def test_without_torchrun_the_world_is_one(environment: dict[str, str]) -> None:
    assert ranks_from(environment) == ALONE == Ranks(rank=0, world_size=1, local_rank=0)
    assert ALONE.leads


def test_torchruns_variables_are_the_place() -> None:
    ranks = ranks_from(TORCHRUN)
    assert ranks == Ranks(rank=5, world_size=8, local_rank=1)
    assert not ranks.leads


@pytest.mark.parametrize("missing", TORCHRUN)
@pytest.mark.parametrize("empty", [False, True])
def test_a_half_set_environment_is_refused_and_the_missing_named(missing: str, empty: bool) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != missing} | (
        {missing: ""} if empty else {}
    )
    with pytest.raises(JobError, match=rf"but not {missing};") as refusal:
        ranks_from(environment)
    assert "torchrun" in str(refusal.value)


@pytest.mark.parametrize("only", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_lone_variable_is_refused_with_all_that_is_missing(only: str) -> None:
    with pytest.raises(JobError) as refusal:
        ranks_from({only: TORCHRUN[only]})
    given, _, missing = str(refusal.value).partition(" but not ")
    assert only in given
    assert all(name in missing for name in TORCHRUN if name != only)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["one", "1.5"])
def test_a_number_that_is_none_is_refused_with_its_value(name: str, value: str) -> None:
    with pytest.raises(JobError, match=f"{name}.*'{value}'"):
        ranks_from(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "8"},
        {"RANK": "9"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-8"},
        {"LOCAL_RANK": "-1"},
        {"LOCAL_RANK": "6"},
    ],
)
def test_a_place_outside_the_world_is_refused(wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(JobError, match=rf"{name}\b.*{value}\b"):
        ranks_from(TORCHRUN | wrong)


class World:
    """Two ranks on a clock of their own: a step takes `step_s`, a question `question_s`, and the other rank wishes to
    stop from `stop_s` on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float, question_s: float) -> None:
        self.step_s, self.question_s = step_s, question_s
        self.now_s, self.asking_s, self.stop_s, self.step = 0.0, 0.0, float("inf"), 0
        monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(distributed.dist, "all_reduce", self._all_reduce)
        self.agreement = Agreement(Ranks(0, 2, 0), {"save": lambda: False, "stop": lambda: False})

    def _all_reduce(self, votes: Any, op: Any) -> None:
        self.now_s += self.question_s
        self.asking_s += self.question_s
        if self.now_s >= self.stop_s:
            votes[1] = 1

    def take_step(self) -> frozenset[str]:
        self.now_s += self.step_s
        self.step += 1
        return self.agreement.after(self.step)


step_times = pytest.mark.parametrize("step_s", [1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.4, 0.9, 2.0])
question_times = pytest.mark.parametrize("question_s", [5e-5, 2e-4, 1e-3])


@step_times
@question_times
def test_asking_costs_half_a_percent_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch, step_s: float, question_s: float
) -> None:
    world = World(monkeypatch, step_s, question_s)
    while world.now_s < 20:  # before the first question its cost is a guess, so the first seconds are not counted
        world.take_step()
    start_s, world.asking_s = world.now_s, 0.0
    while world.now_s < start_s + 60:
        world.take_step()
    assert world.asking_s / (world.now_s - start_s) <= 0.005 * 1.001


@step_times
@question_times
def test_a_wish_of_another_rank_is_known_within_a_second(
    monkeypatch: pytest.MonkeyPatch, step_s: float, question_s: float
) -> None:
    for stop_s in (0.0, 0.5, 3.21, 7.77):
        world = World(monkeypatch, step_s, question_s)
        world.stop_s = stop_s
        while not (agreed := world.take_step()):
            assert world.now_s < 60, "never agreed"
        assert agreed == {"stop"}
        # No rank is asked inside a step, so one that is longer than a second is the least there can be.
        assert world.now_s - stop_s <= max(1.0, step_s) + step_s + question_s


def test_ranks_ask_after_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The period is rank 0's; a follower's own clock must not matter, or one would wait for the other for ever."""
    world = World(monkeypatch, 1e-3, 2e-4)
    leader_asked, periods = [], []

    def leader(votes: Any, op: Any) -> None:
        leader_asked.append(world.step)
        periods.append(int(votes[-1]))

    monkeypatch.setattr(distributed.dist, "all_reduce", leader)
    while world.step < 2000:
        world.take_step()

    world = World(monkeypatch, 0.7, 0.1)
    world.agreement = Agreement(Ranks(1, 2, 1), {"save": lambda: False, "stop": lambda: False})
    follower_asked: list[int] = []

    def follower(votes: Any, op: Any) -> None:
        assert int(votes[-1]) == 0, "a follower proposes no period"
        follower_asked.append(world.step)
        votes[-1] = periods[len(follower_asked) - 1]

    monkeypatch.setattr(distributed.dist, "all_reduce", follower)
    while world.step < 2000:
        world.take_step()
    assert follower_asked == leader_asked
    assert len(leader_asked) > 2


def test_alone_a_wish_is_known_right_after_the_step() -> None:
    wishes = {"stop": False, "save": False}
    agreement = Agreement(ALONE, {name: lambda name=name: wishes[name] for name in wishes})
    assert [agreement.after(step) for step in range(1, 1000)] == [frozenset()] * 999
    wishes["stop"] = True
    assert agreement.after(1000) == {"stop"}
    wishes |= {"stop": False, "save": True}
    assert agreement.after(1001) == {"save"}
