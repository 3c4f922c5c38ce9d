"""Submission without a Slurm: what is written, what sbatch is given, and that nothing is left if it is refused."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.conftest import DIGITS
from toolkit import screening
from toolkit.cluster import request
from toolkit.cluster.plan import Nodes, Plan
from toolkit.cluster.profile import Profile
from toolkit.cluster.request import Request, _in_job, submitted
from toolkit.cluster.shared import refuse_unseen
from toolkit.config import Job, load_job
from toolkit.errors import JobError
from toolkit.run import Run

STAMP = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
SBATCH = """#!/bin/sh
case "$*" in *--version*) echo slurm 22.05; exit;; esac
for file; do :; done
cp "$file" "$(dirname "$0")/../given.sh"
export -p > "$(dirname "$0")/../given.env"
[ -e "$(dirname "$0")/../refuses" ] && { echo "sbatch: error: no more jobs for you" >&2; exit 1; }
echo Submitted batch job 77
"""


class Login:
    """A login node whose sbatch keeps what it is given, in a folder where one job lies."""

    def __init__(self, folder: Path, tools: Path, given: Path) -> None:
        self.folder, self.tools, self.given = folder, tools, given

    def submit(self, *overrides: str, shown: bool = False, screen: Callable[[Job], None] = lambda job: None,
               **more: Any) -> list[str]:  # fmt: skip
        asked = {
            "job": "digits.yaml", "overrides": overrides, "cluster": "", "executor": "slurm", "nodes": "1", "asked": {},
            "image": "", "sweeps": [], "most_at_once": None, "takes_snapshot": True,
        }  # fmt: skip
        runs = submitted(Request(**asked | more), os.environ, screen, shown, waits=False)
        return [os.path.relpath(run.url, self.folder) for run in runs]

    def files(self) -> dict[str, bytes]:
        """Everything in the folder, but for git's own."""
        found = [path for path in self.folder.rglob("*") if ".git" not in path.parts]
        return {str(path): b"" if path.is_dir() else path.read_bytes() for path in found}

    def script(self) -> str:
        return self.given.read_text()


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Login:
    tools, folder = tmp_path / "bin", tmp_path / "my work"
    for path in (tools, folder):
        path.mkdir()
    for name in ("git", "sh", "cp", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("sbatch", "srun"):
        (tools / name).write_text(SBATCH)
        (tools / name).chmod(0o755)
    (folder / "digits.yaml").write_text(DIGITS)
    (folder / "mine.py").write_text("")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=folder, check=True, timeout=30)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(tools))
    return Login(folder, tools, tmp_path / "given.sh")


def test_a_dry_run_writes_nothing_needs_no_slurm_and_shows_what_is_really_submitted(
    login: Login, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = (login.tools / "sbatch").read_text()
    (login.tools / "sbatch").unlink()
    before = login.files()
    assert login.submit(shown=True, nodes="1:2") == ["runs/digits"]
    assert login.files() == before
    shown = capsys.readouterr().out
    (login.tools / "sbatch").write_text(sbatch)
    (login.tools / "sbatch").chmod(0o755)
    assert login.submit(nodes="1:2") == ["runs/digits"]
    assert STAMP.sub("STAMP", login.script()) in STAMP.sub("STAMP", shown)
    assert "srun --overlap --kill-on-bad-exit=1" in shown
    assert "-m toolkit supervise" in shown


def test_what_is_submitted_is_recorded_in_the_run(login: Login, capsys: pytest.CaptureFixture[str]) -> None:
    login.submit()
    run = login.folder / "runs/digits"
    record = json.loads((run / "submitted.json").read_text())
    assert (record["executor"], record["job_id"], record["pid"]) == ("slurm", "77", None)
    assert Path(record["log"]) == Path(record["folder"]) / "77_0_log.out"
    assert json.loads((run / "status.json").read_text())["state"] == "queued"
    assert "digits: queued as job 77 in runs/digits" in capsys.readouterr().out.replace(f"{login.folder}/", "")
    again = load_job(f"{record['folder']}/job-0.yaml")
    assert again.as_written() == load_job("digits.yaml", [f"run.dir='{run}'"]).as_written()


def test_nothing_of_the_environment_is_put_above_the_script(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch takes SBATCH_* before what a script says, and much of what it finds of a job that it is called in."""
    set_here = {
        "SBATCH_PARTITION": "a", "SBATCH_TIMELIMIT": "1", "SBATCH_SIGNAL": "KILL@9", "SBATCH_EXPORT": "NONE",
        "SBATCH_NO_REQUEUE": "1", "SBATCH_ACCOUNT": "mine", "SLURM_MEM_PER_CPU": "1", "SLURM_JOB_ID": "1",
        "SLURM_CONF": "/etc/x", "SLURM_JWT": "who.asks",
    }  # fmt: skip
    for name, value in set_here.items():
        monkeypatch.setenv(name, value)
    login.submit(asked={"partition": "main"})
    given = (login.given.parent / "given.env").read_text()
    assert set(re.findall(r"(?:SBATCH|SLURM)_\w+", given)) == {"SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_JWT"}
    assert {name: os.environ[name] for name in set_here} == set_here


def test_a_secret_of_the_environment_is_not_written(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROP", "0.123456")
    login.submit("model.args.dropout=${env:DROP}")
    assert not [name for name, content in login.files().items() if b"0.123456" in content]


def test_a_refused_job_leaves_nothing_behind(login: Login) -> None:
    (login.tools.parent / "refuses").touch()
    before = login.files()
    for options in ({}, {"sweeps": ["run.seed=1,2"]}):
        with pytest.raises(JobError, match="Slurm has refused the job: .*no more jobs for you"):
            login.submit(**options)
        assert login.files() == before


def test_a_refused_job_leaves_a_run_as_it_was(login: Login) -> None:
    run = Run("runs/digits")
    run.mark("preempted", step=7, summary="it has more to do")
    (login.folder / "runs/digits/slurm/code").mkdir(parents=True)
    (login.folder / "runs/digits/slurm/code/kept").touch()
    (login.tools.parent / "refuses").touch()
    before = login.files()
    with pytest.raises(JobError, match="nothing is queued"):
        login.submit()
    assert {name for name in login.files() if "/code/" not in name} == {name for name in before if "/code/" not in name}
    assert Run("runs/digits").status() == {"state": "preempted", "step": 7, "summary": "it has more to do"}


def test_a_request_that_came_too_late_for_the_last_start_does_not_end_what_is_submitted(login: Login) -> None:
    run = Run("runs/digits")
    run.mark("cancelled")
    for wish in ("stop", "cancel", "save-now"):
        run.ask(wish)
    login.submit()
    assert os.listdir("runs/digits/requests") == ["save-now"]


def test_a_python_that_no_node_can_see_is_refused(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", "/dev/shm/venv")
    (login.folder / "cluster.yaml").write_text(f"shared: ['{login.folder}']\n")
    before = login.files()
    with pytest.raises(JobError, match=r"this Python /dev/shm/venv is on /dev/shm, a tmpfs of this machine"):
        login.submit()
    monkeypatch.setattr("sys.prefix", "/opt/venv")
    with pytest.raises(JobError, match=r"this Python /opt/venv is in none of the folders that the cluster profile"):
        login.submit(cluster="cluster.yaml")
    assert login.files() == before
    monkeypatch.setattr("sys.base_prefix", "/opt/venv")  # it is no venv, and may be installed on each node
    login.submit(cluster="cluster.yaml")


def test_a_job_may_name_a_variable_that_the_profile_has(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    (login.folder / "cluster.yaml").write_text('env: {STEPS: "30"}\n')
    changes = ["train.max_steps=${env:STEPS}"]
    login.submit(*changes, cluster="cluster.yaml")
    plans: list[Plan] = []
    monkeypatch.setattr(request, "supervise", lambda plan, words, paths, environment: plans.append(plan) or 0)
    request.supervised("digits.yaml", changes, "cluster.yaml", "", "", {"STEPS": "20"})
    assert plans[0].job.train.max_steps == 30


def test_a_complete_run_is_not_queued(login: Login, capsys: pytest.CaptureFixture[str]) -> None:
    Run("runs/digits").mark("completed", summary="digits: completed")
    (login.folder / "runs/digits/provenance.json").write_text(
        json.dumps({"job": load_job("digits.yaml", [f"run.dir='{login.folder}/runs/digits'"]).as_written()})
    )
    assert login.submit() == ["runs/digits"]
    assert login.submit(shown=True) == ["runs/digits"]
    assert "digits: completed\nThis run is complete" in capsys.readouterr().out
    assert not login.given.exists()


def test_of_a_sweep_each_point_is_checked_and_has_a_job_of_its_own(
    login: Login, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobError, match="epochs: -1"):
        login.submit(sweeps=["train.epochs=1,-1"])
    with pytest.raises(JobError, match="model 'mpl' is unknown; did you mean 'mlp'"):
        login.submit(sweeps=["model.name=mlp,mpl"], screen=screening.screen)
    assert not (login.folder / "runs").exists()
    login.submit(sweeps=["optimizer.args.lr=0.1,0.01", "run.seed=1,2,3"], most_at_once=2)
    assert "#SBATCH --array=0-5%2" in login.script()
    assert f"toolkit status {login.folder}/runs/digits\n" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in sorted(login.folder.glob("runs/digits/*/submitted.json"))]
    assert sorted(record["job_id"] for record in records) == [f"77_{number}" for number in range(6)]
    for record in records:
        number = record["job_id"].partition("_")[2]
        assert Path(f"{record['folder']}/job-{number}.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.name=resnt"], ["model 'resnt' is unknown"]),
        (["task=clasification"], ["did you mean 'classification'"]),
        (["data.train.name=nothing:Here"], ["data.train 'nothing:Here': no module named 'nothing'"]),
        (["optimizer.args.lrr=1", "schedule.args.warmup=1"], ["unknown argument 'lrr'", "'warmup'"]),
        (["model.args.hidden=many"], ["argument 'hidden' is 'many'"]),
        (["data.transforms=[flip_all]", "data.test.args.splitt=test"], ["'flip_all'", "'splitt'"]),
    ],
)
def test_components_that_do_not_exist_are_refused_all_at_once(
    changes: list[str], words: list[str], login: Login
) -> None:
    before = login.files()
    with pytest.raises(JobError) as caught:
        login.submit(*changes, screen=screening.screen)
    assert all(word in str(caught.value) for word in words), caught.value
    assert login.files() == before
    assert not login.given.exists()


def test_every_job_of_the_repository_passes_the_same_check(pytestconfig: pytest.Config) -> None:
    for path in sorted((pytestconfig.rootpath / "jobs").glob("*.yaml")):
        screening.screen(load_job(str(path), environment={**os.environ}))


def test_components_in_an_image_are_not_looked_for_here(login: Login) -> None:
    def fail(job: Job) -> None:
        raise AssertionError("looked for")

    (login.folder / "cluster.yaml").write_text("container: {runtime: apptainer}\n")
    assert login.submit(image="/images/torch.sif", cluster="cluster.yaml", screen=fail)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("./img.sif", "give an absolute path"),
        ("nvcr.io/nvidia/pytorch", "pyxis wants a # after the registry"),
        ("/images/torch.sqsh", "pyxis cannot mount a path with ' ' in it"),
    ],
)
def test_a_container_that_no_node_could_start_is_refused_here(image: str, words: str, login: Login) -> None:
    before = login.files()
    with pytest.raises(JobError, match=re.escape(words)):
        login.submit(image=image)
    assert login.files() == before
    assert not login.given.exists()


@pytest.mark.parametrize("options", [{}, {"executor": "local", "sweeps": ["run.seed=1,2"]}])
def test_a_number_of_runs_at_a_time_that_would_do_nothing_is_refused(options: dict[str, Any], login: Login) -> None:
    with pytest.raises(JobError, match="--max-parallel is for a --sweep on Slurm"):
        login.submit(most_at_once=2, **options)


def test_without_sbatch_nothing_is_written(login: Login) -> None:
    (login.tools / "sbatch").unlink()
    before = login.files()
    with pytest.raises(
        JobError, match="no sbatch here: submit on a login node of the cluster, or take --executor local"
    ):
        login.submit()
    assert login.files() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"time_min": -5}, r"time_min \(--time\): -5 is not allowed; it must be greater than or equal to 1"),
        ({"gpus_per_node": -3, "partition": 7}, r"partition \(--partition\): 7 (.|\n)*--gpus-per-node\): -3 is not"),
        ({"max_parallel": 0, "sweep": "run.seed=1,2"}, r"max_parallel \(--max-parallel\) is 0; it must be at least 1"),
    ],
)
def test_what_a_program_asks_for_is_checked_as_flags_are(arguments: dict[str, Any], words: str, login: Login) -> None:
    with pytest.raises(JobError, match=words):
        toolkit.submit("digits.yaml", dry_run=True, **arguments)


def test_one_sweep_needs_no_list_and_keeps_the_secret_of_a_run_directory(
    login: Login, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("D", f"{login.folder}/hunter2")
    runs = toolkit.submit("digits.yaml", "run.dir=${env:D}", sweep="optimizer.args.lr=1e-3,3e-3", snapshot=False)
    assert [run.url for run in runs] == [f"{login.folder}/hunter2/lr={lr}" for lr in ("0.001", "0.003")]
    jobs = sorted(login.folder.rglob("job-?.yaml"))
    assert ["${env:D}/lr=" in job.read_text() and "hunter2" not in job.read_text() for job in jobs] == [True, True]


@pytest.mark.parametrize("name", ["a%j", "a\\b", "a\nb"])
def test_a_run_directory_that_slurm_would_read_otherwise_is_refused(name: str, login: Login) -> None:
    with pytest.raises(JobError, match="Slurm cannot write its logs below"):
        login.submit(f"run.dir={json.dumps(name)}")


@pytest.mark.parametrize(
    ("environment", "ranks", "cpus"),
    [
        ({}, 2, None),  # a cluster that does not say
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "3"}, 1, 3),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1, None),
    ],
)
def test_a_job_of_plain_sbatch_has_what_it_has(
    environment: dict[str, str], ranks: int, cpus: int | None, tmp_path: Path
) -> None:
    (tmp_path / "digits.yaml").write_text(DIGITS)
    plan = Plan(load_job(str(tmp_path / "digits.yaml")), _in_job(PROFILE, environment), Nodes())
    words = plan.srun(["n1"], [], "/", {})
    assert plan.processes == ranks
    assert [word for word in words if word.startswith("--cpus-per-task")] == [f"--cpus-per-task={cpus}"] * bool(cpus)


PROFILE = Profile(gpus_per_node=2, cpus_per_gpu=8)
MOUNTS = [("/", "overlay"), ("/home", "nfs4"), ("/home/me/fast", "tmpfs"), ("/dev/shm", "tmpfs"), ("/data x", "ext4")]


@pytest.mark.parametrize(
    ("path", "shared", "refused"),
    [
        (None, (), ""),
        ("/home/me/runs", (), ""),
        ("/var/runs", (), ""),  # the root of a container: who knows
        ("/dev/shm/run", (), "is on /dev/shm, a tmpfs of this machine"),
        ("/home/me/fast", (), "is on /home/me/fast, a tmpfs"),
        ("/home/me/faster/run", (), ""),
        ("/home/me/runs", ("/home", "/scratch"), ""),
        ("/home", ("/home/",), ""),
        ("/homes/runs", ("/home",), "is in none of the folders that the cluster profile calls shared (/home)"),
        ("/home/../var/run", ("/home",), "is in none of the folders"),
        ("/dev/shm/run", ("/dev",), "is on /dev/shm"),
    ],
)
def test_folders_that_no_node_can_see(path: str | None, shared: tuple[str, ...], refused: str) -> None:
    caught = pytest.raises(JobError, match=re.escape(refused)) if refused else contextlib.nullcontext()
    with caught:
        refuse_unseen(path, "run.dir", shared, MOUNTS)


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("/dev/shm")
    with pytest.raises(JobError, match="a tmpfs of this machine"):
        refuse_unseen(str(tmp_path / "runs/x"), "run.dir", ())
