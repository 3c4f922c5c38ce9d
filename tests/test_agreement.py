"""How often the ranks ask each other. No process group is needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from toolkit import agreement
from toolkit.agreement import Agreement
from toolkit.distributed import ALONE, Ranks


class World:
    """Two ranks on a clock of their own: a step takes `step_s`, a question `question_s`, and the other rank wishes to
    stop from `stop_s` on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float, question_s: float) -> None:
        self.step_s, self.question_s = step_s, question_s
        self.now_s, self.asking_s, self.stop_s, self.step = 0.0, 0.0, float("inf"), 0
        monkeypatch.setattr(
            agreement, "time", SimpleNamespace(monotonic=lambda: self.now_s, process_time=lambda: self.now_s)
        )
        monkeypatch.setattr(agreement.dist, "all_reduce", self._all_reduce)
        self.agreement = Agreement(Ranks(0, 2, 0), {"save": lambda: False, "stop": lambda: False})

    def _all_reduce(self, votes: Any, op: Any) -> None:
        self.now_s += self.question_s
        self.asking_s += self.question_s
        if self.now_s >= self.stop_s:
            votes[1] = 1

    def take_step(self) -> frozenset[str]:
        self.now_s += self.step_s
        self.step += 1
        return self.agreement.reached()


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


def test_a_wish_in_the_first_steps_is_known_soon_however_fast_the_start_was(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 2e-3, 2e-4)
    world.agreement.reached()  # before the first step, as `fit` does
    world.stop_s = 0.001
    while not world.take_step():
        assert world.now_s < 1


def test_ranks_ask_after_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The period is rank 0's; a follower's own clock must not matter, or one would wait for the other for ever."""
    world = World(monkeypatch, 1e-3, 2e-4)
    leader_asked, periods = [], []

    def leader(votes: Any, op: Any) -> None:
        leader_asked.append(world.step)
        periods.append(int(votes[-1]))

    monkeypatch.setattr(agreement.dist, "all_reduce", leader)
    while world.step < 2000:
        world.take_step()

    world = World(monkeypatch, 0.7, 0.1)
    world.agreement = Agreement(Ranks(1, 2, 1), {"save": lambda: False, "stop": lambda: False})
    follower_asked: list[int] = []

    def follower(votes: Any, op: Any) -> None:
        assert int(votes[-1]) == 0, "a follower proposes no period"
        follower_asked.append(world.step)
        votes[-1] = periods[len(follower_asked) - 1]

    monkeypatch.setattr(agreement.dist, "all_reduce", follower)
    while world.step < 2000:
        world.take_step()
    assert follower_asked == leader_asked
    assert len(leader_asked) > 2


def test_alone_a_wish_is_known_right_after_the_step() -> None:
    wishes = {"stop": False, "save": False}
    asking = Agreement(ALONE, {name: lambda name=name: wishes[name] for name in wishes})
    assert [asking.reached() for _ in range(1, 1000)] == [frozenset()] * 999
    wishes["stop"] = True
    assert asking.reached() == {"stop"}
    wishes |= {"stop": False, "save": True}
    assert asking.reached() == {"save"}
