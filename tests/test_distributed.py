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
