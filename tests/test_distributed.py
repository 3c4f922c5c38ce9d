"""Who a process is among the ranks. No process group is needed."""

import pytest

from toolkit.distributed import ALONE, Ranks, ranks_from
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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (TORCHRUN | {"TOOLKIT_WORLD_SIZE": "16"}, "8 ranks where 16 were asked for"),
        ({"TOOLKIT_WORLD_SIZE": "16"}, "16 ranks were asked for"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "one of 8 tasks that srun has started"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, "MASTER_ADDR is localhost"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR is 127.0.0.1"),
    ],
)
def test_a_smaller_world_than_was_asked_for_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(JobError, match=words):
        ranks_from(environment)


@pytest.mark.parametrize("more", [{"LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "localhost"}, {"TOOLKIT_WORLD_SIZE": "8"}])
def test_the_world_that_was_asked_for_is_taken(more: dict[str, str]) -> None:
    assert ranks_from(TORCHRUN | more).world_size == 8


def test_one_task_of_srun_may_be_alone() -> None:
    assert ranks_from({"SLURM_STEP_NUM_TASKS": "1"}) == ALONE
