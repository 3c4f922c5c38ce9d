"""What toolkit believes of Slurm's answers is what a real Slurm does."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.slurm.conftest import Cluster, words_of
from toolkit.cluster import queue, slurm
from toolkit.cluster.partitions import Asked, check, partitions
from toolkit.errors import JobError

SMALL = ("--ntasks=1", "--cpus-per-task=1", "--mem=100", "--time=5")
STUBBORN = (
    "srun --overlap bash -c 'trap \"\" TERM; touch started; while :; do sleep 0.2; done' & while :; do wait; done"
)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("tempfile.tempdir", None)


def facts(job: str) -> slurm.JobFacts:
    found = slurm.job_facts(job, patience_s=30)
    assert found, f"job {job} is unknown"
    return found


@pytest.mark.parametrize(
    "nodelist",
    [
        "n1",
        "n[1-4]",
        "n[1-3,07-09],gpu-a[1-2]b[3-4]",
        "n[098-102],x",
        "n[08-11]",
        "a[1-2][3-4],b,c[5]",
        "r1n[9-10],r2n9",
    ],
)
def test_lists_of_nodes_are_expanded_as_scontrol_does(cluster: Cluster, nodelist: str) -> None:
    assert slurm.expand(nodelist) == words_of("scontrol", "show", "hostnames", nodelist).split()


def test_the_facts_of_jobs_that_wait_run_and_have_ended(cluster: Cluster) -> None:
    held = cluster.sbatch("true", *SMALL, "--hold", "--job-name=a JobState=FAILED b")
    runs = cluster.sbatch("sleep 100", *SMALL, "--nodes=2", "--ntasks=2", "--no-requeue")
    cluster.wait(runs, "RUNNING")
    assert (facts(held).state, facts(held).reason, facts(held).nodes) == ("PENDING", "JobHeldUser", ())
    assert facts(held).can_requeue
    now = facts(runs)
    assert (now.state, now.can_requeue, now.restarts, len(now.nodes)) == ("RUNNING", False, 0, 2)
    assert now.ends_at_s is not None
    assert 200 < now.ends_at_s - time.time() <= 300
    assert now.log == str(cluster.folder / f"{runs}.out")
    slurm.cancel(runs)
    cluster.wait(runs, "CANCELLED")
    assert facts(runs).state == "CANCELLED"
    slurm.cancel(runs)
    assert slurm.job_facts("987654") is None


def test_of_a_preempted_job_the_end_is_that_of_its_grace(cluster: Cluster) -> None:
    job = cluster.sbatch("trap '' TERM; while :; do sleep 0.2; done", "--nodelist=n4", "--exclusive", "--time=30")
    cluster.wait(job, "RUNNING")
    cluster.sbatch("sleep 5", "--partition=urgent", "--nodelist=n4", "--exclusive", "--time=1")
    end_s = cluster.until(lambda: (now := facts(job).ends_at_s) and now < time.time() + 60 and now, "a nearer end")
    assert end_s - time.time() <= 12
    assert slurm.requeue(job, 0) == slurm.REQUEUED


@pytest.mark.campaign  # Slurm looks at time limits every 30 s
@pytest.mark.timeout(240)
def test_a_job_that_its_time_limit_ends_is_queued_again_only_if_it_is_asked_for(cluster: Cluster) -> None:
    stubborn = "trap '' TERM; while :; do sleep 0.2; done"
    asked, left = (cluster.sbatch(stubborn, *SMALL[:-1], "--time=1", "--requeue") for _ in range(2))
    cluster.wait(asked, "COMPLETING", timeout_s=150)
    assert (facts(asked).reason, facts(asked).restarts) == ("TimeLimit", 0)
    assert slurm.requeue(asked, 0) == slurm.REQUEUED
    assert slurm.requeue(asked, 0) == slurm.BY_SLURM
    cluster.wait(left, "TIMEOUT", timeout_s=60)
    assert slurm.requeue(left, 0) == slurm.REQUEUED
    for job in (asked, left):
        cluster.wait(job, "RUNNING", restarts=1)


def test_one_task_of_an_array_is_queued_again_once_and_the_others_go_on(cluster: Cluster) -> None:
    array = cluster.sbatch("env > env.$SLURM_ARRAY_TASK_ID; sleep 100", *SMALL, "--array=0-1")
    for task in (0, 1):
        cluster.until(lambda task=task: facts(f"{array}_{task}").state == "RUNNING", "a task")
        cluster.until((cluster.folder / f"env.{task}").exists, "its environment")
    environments = [
        dict(line.split("=", 1) for line in (cluster.folder / f"env.{task}").read_text().splitlines() if "=" in line)
        for task in (0, 1)
    ]
    of_array = next(environment for environment in environments if environment["SLURM_JOB_ID"] == array)
    job = slurm.own_job(of_array)
    assert job
    assert slurm.requeue(job, 0) == slurm.REQUEUED
    assert slurm.requeue(job, 0) == slurm.BY_SLURM
    other = f"{array}_{1 - int(job[-1])}"
    assert (facts(other).state, facts(other).restarts, facts(job).restarts) == ("RUNNING", 0, 1)
    slurm.cancel(other)
    assert facts(job).state in ("PENDING", "COMPLETING")


def test_a_cancelled_job_that_is_still_ending_is_not_brought_back(cluster: Cluster) -> None:
    job = cluster.sbatch(STUBBORN, *SMALL)
    cluster.until((cluster.folder / "started").exists, "the step")
    slurm.cancel(job)
    assert slurm.requeue(job, 0) in ("COMPLETING", "CANCELLED")
    cluster.wait(job, "CANCELLED")
    assert slurm.requeue(job, 0) == "CANCELLED"
    assert facts(job).restarts == 0


def test_the_queue_says_why_jobs_wait_and_how_they_ended(cluster: Cluster) -> None:
    held = cluster.sbatch("true", *SMALL, "--hold")
    later = cluster.sbatch("true", *SMALL, "--begin=now+1hour")
    never = cluster.sbatch("true", *SMALL, f"--dependency=afterok:{held}")
    array = cluster.sbatch("sleep 100", *SMALL, "--array=0-1%1")
    done = cluster.sbatch("exit 3", *SMALL)
    cluster.wait(done, "FAILED")
    cluster.until(lambda: facts(f"{array}_0").state == "RUNNING", "the first task")
    answer = queue.look([held, later, never, f"{array}_0", f"{array}_1", done, "987654"])
    said = {job: (entry.state, entry.why() if entry.waits else "") for job, entry in answer.entries.items()}
    assert said[held] == ("PENDING", "it is held; let it go with: scontrol release (JobHeldUser)")
    assert "for later (BeginTime); expected to start at 20" in said[later][1]
    assert said[never] == ("PENDING", "it waits for another job (Dependency)")
    assert said[f"{array}_0"] == ("RUNNING", "")
    assert "as many of its sweep run as --max-parallel allows" in said[f"{array}_1"][1]
    assert said[done] == ("FAILED", "")
    assert "987654" not in said
    cluster.until(lambda: queue._accounting([done]).get(done), "the accounting")
    assert queue._accounting([done])[done][0] == "FAILED"


def test_partitions_are_what_sbatch_takes(cluster: Cluster) -> None:
    there = {partition.name: partition for partition in partitions() or []}
    assert there["main"].default
    assert [(shape.nodes, shape.cpus, shape.gpus) for shape in there["main"].shapes] == [(4, 4, 2)]
    for options, asked in (
        (["--nodes=5"], Asked(nodes=5)),
        (["--gpus-per-node=3"], Asked(gpus_per_node=3)),
        (["--cpus-per-task=5"], Asked(cpus_per_node=5)),
        (["--mem=9G"], Asked(mem_gb_per_node=9)),
        (["--partition=nope"], Asked("nope")),
    ):
        with pytest.raises(JobError, match="main"):
            check(asked)
        with pytest.raises(AssertionError, match="sbatch: error"):
            cluster.sbatch("true", *options)  # held jobs are not looked at so closely
    check(Asked("main,urgent", 4, 2, 4, 7.8, 9999))
    cluster.sbatch(
        "true", "--hold", "--nodes=4", "--gpus-per-node=2", "--cpus-per-task=4", "--mem=7987M", "--time=9999"
    )


def test_many_looks_at_many_runs_cost_slurmctld_one_question(cluster: Cluster) -> None:
    jobs = [cluster.sbatch("true", *SMALL, "--hold") for _ in range(6)]
    for job in jobs:
        leave(cluster, f"runs/{job}", job, {"state": "queued"})
    before, start_s = asked(cluster), time.monotonic()
    for _ in range(4):
        assert cluster.toolkit("status").count("it is held") == 6
    again = (time.monotonic() - start_s) // queue.PERIOD_S
    assert asked(cluster) - before <= 1 + again


def asked(cluster: Cluster) -> int:
    """How often slurmctld has been asked for all jobs of one user."""
    match = re.search(r"REQUEST_JOB_USER_INFO\s*\(.*?\)\s*count:(\d+)", words_of("sdiag"))
    return int(match[1]) if match else 0


def leave(cluster: Cluster, run: str, job: str, status: dict[str, Any]) -> Path:
    """What a submission leaves in a run."""
    folder = cluster.folder / run
    folder.mkdir(parents=True, exist_ok=True)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    submitted = {"executor": "slurm", "job_id": job, "pid": None, "host": "login", "folder": str(cluster.folder),
                 "submitted_at": at, "log": str(cluster.folder / f"{job}.out")}  # fmt: skip
    (folder / "submitted.json").write_text(json.dumps(submitted))
    if status:
        (folder / "status.json").write_text(json.dumps(status | {"submitted_at": at}))
    return folder


def trained(cluster: Cluster, *options: str) -> str:
    """A job that trains until it is stopped."""
    words = f"exec {sys.executable} -m toolkit train digits.yaml run.dir=runs/x train.max_steps=1000000"
    words += " log.every_steps=1000 checkpoint.every_steps=100000"
    return cluster.sbatch(f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1\n{words}", *SMALL, *options)


def test_a_waiting_run_is_taken_from_the_queue(cluster: Cluster) -> None:
    job = trained(cluster, "--hold")
    folder = leave(cluster, "runs/x", job, {"state": "queued"})
    assert "runs/x: queued\n  it is held; let it go with: scontrol release (JobHeldUser)" in cluster.toolkit(
        "status", "runs/x"
    )
    assert "has said nothing yet; its log will be" in cluster.toolkit("logs", "runs/x", status=2)
    assert "runs/x is cancelled" in cluster.toolkit("cancel", "runs/x")
    assert facts(job).state == "CANCELLED"
    assert json.loads((folder / "status.json").read_text())["state"] == "cancelled"
    assert "runs/x: cancelled\n  cancelled while it waited" in cluster.toolkit("status", "runs/x")
    assert "has ended already" in cluster.toolkit("cancel", "runs/x")


@pytest.mark.parametrize("now", [False, True])
def test_a_running_run_saves_everything_unless_it_is_ended_at_once(cluster: Cluster, now: bool) -> None:
    job = trained(cluster)
    folder = leave(cluster, "runs/x", job, {})
    cluster.until(lambda: "running" in cluster.toolkit("status", "runs/x"), "the run")
    assert f"job {job}" in cluster.toolkit("status", "runs/x")
    assert "digits: starting in runs/x" in cluster.toolkit("logs", "runs/x")
    cluster.toolkit("cancel", "runs/x", *["--now"] * now)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "cancelled"
    if not now:  # else it depends on KillWait
        assert (folder / f"checkpoints/step-{status['step']:08d}").exists()
    cluster.wait(job, "CANCELLED" if now else "FAILED")  # the shell's own status is 75
    assert "runs/x: cancelled at step" in cluster.toolkit("status", "runs/x")


def test_a_run_whose_job_was_killed_is_lost_once_its_heartbeat_is_too_old(cluster: Cluster) -> None:
    job = trained(cluster)
    leave(cluster, "runs/x", job, {})
    cluster.until(lambda: "running" in cluster.toolkit("status", "runs/x"), "the run")
    words_of("scancel", "--signal=KILL", "--batch", job)
    cluster.wait(job, "FAILED")
    assert "running" in cluster.toolkit("status", "runs/x")
    said = cluster.until(lambda: "lost" in (said := cluster.toolkit("status", "runs/x")) and said, "its loss")
    assert re.search(rf"no heartbeat for (1[6-9]|2\d) s, and job {job} ended as FAILED", said), said
    assert "has ended already: it is lost" in cluster.toolkit("cancel", "runs/x")
