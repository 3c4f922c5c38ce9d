"""Every fault of the campaign on the real Slurm; `make test` inflicts five of them, `make test-slurm` all."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns.cluster import FAULTS, WITHIN, Fault, shrink, store_of_all_nodes, suffer, undisturbed
from tests.campaigns.faults import Outcome

ALWAYS = ("preempted by urgent", "rank 1 killed", "supervisor killed", "slurmstepd killed", "node killed")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return undisturbed(tmp_path_factory.mktemp("survival") / "undisturbed")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(one, marks=() if one.name in ALWAYS else pytest.mark.campaign) for one in FAULTS],
    ids=lambda fault: fault.name.replace(" ", "-"),
)
def test_a_job_ends_as_if_nothing_had_been(
    cluster: Any, tmp_path: Path, expected: Outcome, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    with store_of_all_nodes(tmp_path / "s3") if fault.remote else contextlib.nullcontext("") as run:
        took_s, lost = suffer(fault, tmp_path / "scene", expected, run=run)
    with capsys.disabled():
        print(f"\n  {fault.name}: first new step after {took_s:.1f} s, {lost} steps lost")


@pytest.mark.campaign
def test_a_job_on_two_nodes_goes_on_with_one(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    took_s, worst = shrink(tmp_path / "shrink")
    with capsys.disabled():
        print(f"\n  one of two nodes killed: first new step after {took_s:.1f} s, weights within {worst:.1e}")
    assert took_s < 60
    assert worst <= WITHIN
