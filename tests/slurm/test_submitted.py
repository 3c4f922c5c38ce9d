"""What is submitted to a real Slurm: it trains as here, from the code as it was, and wrong jobs are never queued."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, ROOT, Workplace
from tests.slurm.conftest import Cluster, words_of
from toolkit.proof import NOT_OF_THE_JOB

# A schedule that says which version of it has run, and checks what it is given.
MINE = """
import os
import time
from pathlib import Path

from toolkit import optim


def schedule(step, total_steps, words="", length=0, fails_at=None, pause_s=0.0):
    assert len(words) == length
    Path("ran").write_text("old")
    if step == fails_at:
        raise ValueError("as asked")
    time.sleep(pause_s)
    return optim.cosine(step, total_steps, warmup_steps=5)
"""
PROFILE = """
partition: main
gpus_per_node: 2
cpus_per_gpu: 1
mem_gb_per_gpu: 1
time_min: 5
signal_lead_s: 60
env: {OMP_NUM_THREADS: "1", GLOO_SOCKET_IFNAME: eth0}
"""
HOSTILE = """it's "a" $(touch pwned); `touch pwned` & # ü"""
SUBMIT = ("submit", "job.yaml", "--cluster", "site.yaml")
SLOW = ("schedule.args.pause_s=0.05", "train.max_steps=100000", "log.every_steps=100")


def made(folder: Path) -> Workplace:
    """A workplace that is a git repository with a job of its own."""
    folder.mkdir(parents=True)
    place = Workplace(folder)
    place.write("mine.py", MINE)
    place.write("job.yaml", re.sub(r"(?m)^schedule:.*$", "schedule: {name: mine:schedule}", DIGITS))
    place.write("site.yaml", PROFILE)
    place.write(".gitignore", "runs\nran\n__pycache__\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        words_of("git", *words, cwd=folder)
    return place


@pytest.fixture
def place(cluster: Cluster) -> Workplace:
    return made(cluster.folder / "work")


def job_of(place: Workplace, run: str = "runs/job") -> str:
    job: str = json.loads((place.folder / run / "submitted.json").read_text())["job_id"]
    return job


def told(place: Workplace, run: str) -> list[dict[str, Any]]:
    """The metrics, without what is measured."""
    return [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in place.metrics(run)]


def test_two_nodes_train_as_four_processes_here_whatever_things_are_called(cluster: Cluster, equal: Any) -> None:
    place = made(cluster.folder / HOSTILE)
    words = f"schedule.args.words={json.dumps(HOSTILE)}", f"schedule.args.length={len(HOSTILE)}"
    there = f"runs/{HOSTILE}"
    said = place.run(
        *SUBMIT, *words, f"run.dir={json.dumps(there)}", "--nodes", "2", "--wait",
        GLOO_SOCKET_IFNAME="",
    )  # fmt: skip
    assert "starting in" in said, "--wait shows the log"
    status = place.status(there)
    assert (status["state"], status["step"], status["slurm_job_id"], len(status["hosts"])) == (
        "completed", 40, job_of(place, there), 4,
    )  # fmt: skip
    place.run("train", "job.yaml", *words, "run.dir=runs/here", "--processes", "4")
    assert equal(place.tensors(there, 40), place.tensors("runs/here", 40))
    assert told(place, there) == told(place, "runs/here")
    assert not list(cluster.folder.rglob("pwned"))
    assert "This run is complete" in place.run(*SUBMIT, *words, f"run.dir={json.dumps(there)}", "--nodes", "2")
    assert not cluster.jobs()


def test_a_job_runs_the_code_and_the_job_file_that_were_submitted(cluster: Cluster, place: Workplace) -> None:
    place.write("site.yaml", PROFILE + "sbatch: {begin: now+8}\n")
    place.write("untracked.py", "")
    said = place.run(*SUBMIT)
    assert "WARNING: not in the snapshot, as git does not track it: untracked.py" in said
    place.write("mine.py", MINE.replace('"old"', '"new"'))
    place.write("job.yaml", DIGITS.replace("max_steps: 40", "max_steps: 10"))
    assert "it may not begin yet" in place.run("status", "runs/job")
    assert re.search(r"runs/job is already job \d+, which is PENDING", place.run(*SUBMIT, status=2))
    cluster.wait(job_of(place), "COMPLETED")
    assert (place.folder / "ran").read_text() == "old"
    assert place.status("runs/job")["step"] == 40
    source = json.loads((place.folder / "runs/job/provenance.json").read_text())["attempts"][-1]
    assert words_of("git", "rev-parse", "HEAD", cwd=place.folder).strip() in json.dumps(source)


def test_who_waits_ends_as_the_job_ends(cluster: Cluster, place: Workplace) -> None:
    one = ("--gpus-per-node", "1", "--wait")
    fails = place.start(
        *SUBMIT, *one, "run.dir=runs/fails", "schedule.args.fails_at=5", "launch.max_restarts=0", "train.max_steps=30"
    )
    long = place.start(*SUBMIT, *one, "run.dir=runs/long", *SLOW)
    try:
        cluster.until((place.folder / "runs/long/metrics.jsonl").exists, "the first steps")
        assert "which is RUNNING" in place.run(*SUBMIT, "run.dir=runs/long", *SLOW, status=2)
        place.run("cancel", "runs/long")
        out, err = fails.communicate(timeout=300)
        assert (fails.returncode, "ValueError: as asked" in err) == (1, True), out + err
        out, err = long.communicate(timeout=300)
        assert long.returncode == 75, out + err
        assert place.status("runs/long")["state"] == "cancelled"
        cluster.until(lambda: not cluster.jobs(), "the end of both jobs")
    finally:
        for process in (fails, long):
            process.kill()
            process.communicate()


def requests() -> int:
    """How often slurmctld was asked about jobs, nodes or partitions; what its own daemons tell it is not counted."""
    asked = re.findall(r"^\s*REQUEST_(?!STATS)\w*INFO\w* +\( *\d+\) +count:(\d+)", words_of("sdiag"), re.MULTILINE)
    return sum(map(int, asked))


def test_a_sweep_is_an_array_of_runs_of_which_one_can_be_cancelled(cluster: Cluster, place: Workplace) -> None:
    long = 10**6
    place.run(
        *SUBMIT, "--gpus-per-node", "1", "--max-parallel", "2", "schedule.args.pause_s=0.002", "log.every_steps=1000",
        "checkpoint.best={metric: val/accuracy, mode: max}",
        "--sweep", f"train.max_steps={long},20,40,60,80,100",
    )  # fmt: skip
    runs = {steps: f"runs/job/max_steps={steps}" for steps in (long, 20, 40, 60, 80, 100)}
    array = job_of(place, runs[long]).partition("_")[0]
    assert [job_of(place, run) for run in runs.values()] == [f"{array}_{number}" for number in range(6)]
    assert "ArrayTaskThrottle=2" in words_of("scontrol", "show", "job", array)
    cluster.until(lambda: place.status(runs[long])["state"] == "running", "the first run")
    place.run("cancel", runs[long])
    assert place.status(runs[long])["state"] == "cancelled"
    cluster.until(lambda: not cluster.jobs(), "the end of the array", timeout_s=300)
    table = json.loads(place.run("status", "runs/job", "--json"))
    by_run = {Path(one["run"]).name: one for one in table}
    states = {steps: by_run[Path(run).name]["state"] for steps, run in runs.items()}
    assert states == {long: "cancelled"} | dict.fromkeys((20, 40, 60, 80, 100), "completed")
    ranked = [one["best"] for one in table if one["best"] is not None]
    assert len(set(ranked)) > 1
    assert ranked == sorted(ranked, reverse=True), "the best is not the first"
    log = Path(json.loads((place.folder / runs[long] / "submitted.json").read_text())["log"]).read_text()
    assert "is queued again" not in log


def test_however_often_status_is_asked_slurm_is_asked_once_in_10_s(cluster: Cluster, place: Workplace) -> None:
    place.write("site.yaml", PROFILE + "sbatch: {begin: now+600}\n")
    place.run(*SUBMIT, "--sweep", "run.seed=1,2,3,4,5,6")

    def ask(times: int) -> int:
        """How many requests of slurmctld so many looks at all runs cost."""
        before = requests()
        for _ in range(times):
            said = place.run("status", "runs/job", TMPDIR=str(place.folder))
            assert len(re.findall(r"^ *\S+ +queued ", said, re.MULTILINE)) == 6
        return requests() - before

    once, start_s = ask(1), time.monotonic()
    again, took_s = ask(6), time.monotonic() - start_s
    print(f"{once} requests of slurmctld for the first status, {again} for 6 more in {took_s:.1f} s")
    assert 1 <= once <= 2
    assert again <= once * int(took_s / 10 + 0.5)


def test_a_run_begun_here_goes_on_under_slurm(cluster: Cluster, place: Workplace) -> None:
    place.run("train", "job.yaml", "train.max_steps=20")
    said = place.run(*SUBMIT, "--nodes", "2", "--gpus-per-node", "1", "--wait")
    assert "resuming at step 20" in said
    assert [line["step"] for line in place.metrics("runs/job")][-1] == 40
    assert place.status("runs/job")["state"] == "completed"


@pytest.mark.campaign  # Slurm lets a job that is queued again wait for two minutes
def test_plain_sbatch_is_watched_too_and_queues_itself_again_at_the_time_limit(
    cluster: Cluster, place: Workplace
) -> None:
    steps = ("train.max_steps=700", "schedule.args.pause_s=0.1", "log.every_steps=50")
    script = [
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", "--mem=1G", "--time=1", "--output=%j.out",
        ROOT / "slurm/train.sbatch", "job.yaml", *steps, "--cluster", "site.yaml",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    job = words_of(*script, cwd=place.folder, env=environment).strip()
    cluster.wait(job, "COMPLETED", timeout_s=330, restarts=1)
    said = (place.folder / f"{job}.out").read_text()
    assert re.search(r"told to stop \(SIGUSR2, \d+ s before the job's end\): saving", said), said
    assert f"job {job} is queued again" in said
    assert "resuming at step" in said
    status = place.status("runs/job")
    assert (status["state"], status["step"]) == ("completed", 700)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--partition", "mian"), "there is no partition mian; choose one of"),
        (("--nodes", "5"), "5 nodes were asked for, and it has 4"),
        (("--gpus-per-node", "8"), "8 GPUs a node were asked for, and no node has more than 2"),
        (("--partition", "short", "--time", "5"), "5 min were asked for, and at most 1 min are allowed"),
        (("run.dir=/dev/shm/run",), "is on /dev/shm, a tmpfs of this machine, which no node can see"),
        (("train.max_stepz=1",), "did you mean 'max_steps'"),
        (("model.name=resnt",), "model 'resnt' is unknown"),
        (("--cluster", "faulty.yaml"), "did you mean 'partition'"),
        (("--cluster", "sit.yaml"), "did you mean site.yaml?"),
        (("--account", "a\ntouch pwned"), "one line of text"),
        (("--sweep", "model.name=mlp,resnt"), "model 'resnt' is unknown"),
        (("--executor", "local", "--nodes", "2"), "leave out --nodes and --container"),
        (("--nodes", "2:1"), "nor a range, such as 1:4"),
    ],
)
def test_what_is_wrong_is_never_queued(
    words: tuple[str, ...], message: str, cluster: Cluster, place: Workplace
) -> None:
    place.write("faulty.yaml", "partitoin: main\n")
    assert message in place.refused(*SUBMIT, *words)
    assert not cluster.jobs()


def test_without_sbatch_nothing_is_queued(cluster: Cluster, place: Workplace) -> None:
    assert "no sbatch here: submit on a login node" in place.refused(*SUBMIT, PATH=str(place.folder))


def test_a_script_of_plain_sbatch_is_short_and_sound() -> None:
    script = ROOT / "slurm/train.sbatch"
    assert len(script.read_text().splitlines()) <= 40
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
