"""Which nodes of an allocation are used for the next start, after what has befallen them."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS
from toolkit.cluster import allocation, batch, slurm
from toolkit.cluster.allocation import Allocation
from toolkit.cluster.memory import Memory
from toolkit.cluster.partitions import Partition, Shape
from toolkit.cluster.plan import Nodes, Plan
from toolkit.cluster.profile import Profile
from toolkit.config import load_job
from toolkit.postmortem import Failure
from toolkit.pulse import Pulse
from toolkit.run import Run

HOSTS = ["n1", "n2", "n3", "n4"]


class Slurm:
    """Some of whose nodes are dead, in place of the real one."""

    def __init__(self) -> None:
        self.dead, self.asked = set[str](), list[tuple[str, ...]]()

    def ask(self, *words: str, timeout_s: float = 0.0, patience_s: float = 0.0) -> str:
        if words[0] == "scontrol":
            raise slurm.AwayError("no answer")
        self.asked.append(words)
        if any(f"--nodelist={host}" in words for host in self.dead):
            raise slurm.AwayError("no answer")
        return ""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Slurm:
    found = Slurm()
    monkeypatch.setattr(allocation.slurm, "ask", found.ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text(DIGITS)
    return found


def allocated(nodes: str, hosts: list[str] = HOSTS) -> Allocation:
    plan = Plan(load_job("digits.yaml"), Profile(gpus_per_node=2), Nodes.parsed(nodes))
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": ",".join(hosts)}
    return Allocation(plan, "7", Memory(Run(plan.job.run.dir), "7"), environment, [], lambda number: None)


NUMBERS = count()


def failure(
    host: str, rank: int | None = 0, blames: bool = True, kind: str = "", lost: tuple[str, ...] = ()
) -> Failure:
    """Of a kind of its own, unless that is given."""
    kind = kind or f"kind {next(NUMBERS)}"
    return Failure("who", kind, "cause", "remedy", Pulse(), rank, host, blames_host=blames, lost=lost)


def after(here: Allocation, failure: Failure) -> str:
    """Why a failure leaves no other start, or nothing."""
    return here.after(failure, 20).ends


@pytest.mark.usefixtures("fake")
def test_what_is_no_fault_of_a_node_costs_no_node() -> None:
    here = allocated("4")
    assert [after(here, failure("n2", blames=False)) for _ in range(3)] == [""] * 3
    assert after(here, failure("login")) == ""
    assert (here.fit(), here.short) == (HOSTS, False)


@pytest.mark.usefixtures("fake")
def test_a_node_that_has_failed_twice_is_left_out_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    here = allocated("2:4")
    assert after(here, failure("n2")) == ""
    assert here.fit() == HOSTS
    assert after(here, failure("n2")) == ""
    assert here.fit() == ["n1", "n3", "n4"]
    assert "node n2 is left out from now on: it has failed 2 times" in capfd.readouterr().out


@pytest.mark.usefixtures("fake")
def test_too_few_nodes_end_it_here_and_the_job_is_to_be_queued_again() -> None:
    here = allocated("4")
    after(here, failure("n2"))
    assert after(here, failure("n2")) == "3 of at least 4 nodes are left here"
    assert here.short


def test_a_dead_node_is_left_out_at_once(fake: Slurm, capfd: pytest.CaptureFixture[str]) -> None:
    here = allocated("1:4")
    assert after(here, failure("n1", rank=None)) == ""
    assert here.fit() == HOSTS, "it has answered"
    fake.dead = {"n3"}
    assert after(here, failure("n3", rank=None)) == ""
    assert here.fit() == ["n1", "n2", "n4"]
    assert "node n3 is left out from now on: it does not answer" in capfd.readouterr().out
    assert fake.asked[-1] == (
        "srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=n3", "--mem=0", "true",
    )  # fmt: skip


@pytest.mark.usefixtures("fake")
def test_a_job_that_is_started_again_remembers_its_nodes() -> None:
    here = allocated("2:4")
    after(here, failure("n2"))
    after(here, failure("n2"))
    after(here, failure("n4"))
    assert json.loads(Path("runs/digits/nodes.json").read_text())["failures"] == {"n2": 2, "n4": 1}
    again = allocated("2:4")
    assert again.fit() == ["n1", "n3", "n4"]
    after(again, failure("n4"))
    assert again.fit() == ["n1", "n3"]


@pytest.mark.parametrize(("partition", "excluded"), [("gpu", []), ("gpu,same", []), ("many", ["n1"])])
def test_a_node_is_excluded_only_if_enough_that_fit_are_left_in_one_partition(
    partition: str, excluded: list[str], fake: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, cpus = Shape(4, 16, 64000, 2), Shape(20, 16, 64000, 0)
    shapes = {"gpu": (gpus, cpus), "same": (gpus,), "many": (Shape(5, 16, 64000, 2),)}
    there = [Partition(name, False, "up", 60, shapes) for name, shapes in shapes.items()]
    monkeypatch.setattr(batch.partitions, "partitions", lambda: there)
    here = allocated("4")
    for _ in range(2):
        after(here, failure("n1"))
    profile = here.plan.profile.model_copy(update={"partition": partition})
    assert batch._to_exclude(replace(here.plan, profile=profile), here.memory) == excluded


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("content", ["", "{", '{"failures": {"n2": 9}}'])
def test_if_slurm_has_no_others_they_are_used_all_the_same(content: str) -> None:
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/nodes.json").write_text(content)
    assert allocated("2", ["n1", "n2"]).fit() == ["n1", "n2"]


@pytest.mark.usefixtures("fake")
def test_a_start_is_over_as_many_fit_nodes_as_the_run_may_have(tmp_path: Path) -> None:
    here: Any = allocated("1:2", ["n1", "n2", "n3"])
    step = here.attempt(tmp_path)
    assert (step.hosts, step.processes) == (["n1", "n2"], 4)
    assert "--nodelist=n1,n2" in step.srun
    after(here, failure("n1"))
    after(here, failure("n1"))
    assert here.attempt(tmp_path).hosts == ["n2", "n3"]


@pytest.mark.usefixtures("fake")
def test_what_fails_on_one_node_after_another_is_the_jobs_own_and_costs_none() -> None:
    here = allocated("1:4")
    assert after(here, failure("n2", kind="SIGSEGV")) == ""
    assert "on node n2 and now on n3, with no new checkpoint since: it is the job's own" in after(
        here, failure("n3", kind="SIGSEGV")
    )
    assert (here.fit(), here.short, here.memory.failures["n2"]) == (HOSTS, False, 0)
    assert not here.after(failure("n4", kind="SIGSEGV"), 30).ends, "there is a new checkpoint"


@pytest.mark.usefixtures("fake")
def test_the_next_start_of_the_job_knows_what_failed_before() -> None:
    after(allocated("2"), failure("n2", kind="SIGSEGV"))
    assert "it is the job's own" in after(allocated("2"), failure("n1", kind="SIGSEGV"))


def test_all_nodes_that_are_lost_at_once_are_left_out_together(fake: Slurm) -> None:
    fake.dead = {"n2", "n4"}
    here = allocated("1:4")
    assert here.after(failure("n2", rank=None, lost=("n2", "n3", "n4")), 20).mended
    assert here.fit() == ["n1", "n3"]
