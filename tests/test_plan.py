"""What is asked of Slurm for a job, word by word, and what a shell makes of its set-up lines."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS
from toolkit.cluster.plan import Nodes, Plan
from toolkit.cluster.profile import Container, Profile
from toolkit.config import load_job
from toolkit.errors import JobError

HOSTILE = [
    "a b",
    "it's",
    'say "hi"',
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a\ntouch pwned\n",
    "*",
    "\\",
    "é",
]
SRUN = "srun --overlap --kill-on-bad-exit=1 --mpi=none --cpu-bind=none --export=ALL".split()
AGENT = ["-m", "toolkit.cluster.agent"]


@pytest.fixture
def job(tmp_path: Path) -> Any:
    (tmp_path / "digits.yaml").write_text(DIGITS)
    return load_job(str(tmp_path / "digits.yaml"))


def srun(plan: Plan, *hosts: str, binds: tuple[str, ...] = ()) -> list[str]:
    return plan.srun(hosts, binds, "/work/a b", {"AWS_PROFILE": "x"})


def test_one_node_without_gpus_leaves_the_rest_to_slurm(job: Any) -> None:
    plan = Plan(job, Profile(), Nodes())
    assert plan.options() == {
        "job-name": "digits", "nodes": 1, "signal": "B:USR2@120", "requeue": True,
    }  # fmt: skip
    assert srun(plan, "n1") == [
        *SRUN, "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist=n1", sys.executable, *AGENT,
    ]  # fmt: skip
    assert plan.processes == 1


def test_a_range_of_nodes_with_gpus(job: Any) -> None:
    profile = Profile(
        partition="a100,h100", account="vision", qos="low", constraint="ib&a100", gpus_per_node=4, cpus_per_gpu=8,
        mem_gb_per_gpu=60.5, cpus_per_node=3, mem_gb_per_node=5.0, time_min=90, signal_lead_s=60,
        sbatch={"exclusive": True, "mail_type": "FAIL", "nice": 10, "comment": "it's ours", "reservation": None},
    )  # fmt: skip
    plan = Plan(job, profile, Nodes(1, 4))
    assert plan.options() == {
        "job-name": "digits", "nodes": "1-4", "cpus-per-task": 32, "gpus-per-node": 4,
        "mem": "247808M", "time": 90, "partition": "a100,h100", "account": "vision", "qos": "low",
        "constraint": "ib&a100", "signal": "B:USR2@60", "requeue": True, "no-kill": True, "exclusive": True,
        "mail-type": "FAIL", "nice": 10, "comment": "it's ours",
    }  # fmt: skip
    assert srun(plan, "n1", "n3") == [
        *SRUN, "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n3", "--no-kill", "--cpus-per-task=32",
        sys.executable, *AGENT,
    ]  # fmt: skip
    assert (plan.processes, plan.asked().nodes, plan.asked().mem_gb_per_node) == (4, 1, 242.0)


def test_nodes_without_gpus_have_cpus_and_memory_of_their_own_and_ranks_as_the_job_says(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(DIGITS)
    job = load_job(str(tmp_path / "digits.yaml"), ["launch.processes=2"])
    plan = Plan(job, Profile(cpus_per_node=3, mem_gb_per_node=5.5, cpus_per_gpu=8), Nodes(2, 2))
    options = plan.options()
    assert (plan.processes, options["cpus-per-task"], options["mem"], options["nodes"]) == (2, 3, "5632M", 2)
    assert "gpus-per-node" not in options
    assert "--no-kill" not in srun(plan, "n1", "n2")


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        (
            "pyxis",
            [
                "--container-image=nvcr.io#nvidia/pytorch:26.01-py3",
                "--container-mounts=/data:/datasets,/scratch:/scratch",
                "--container-workdir=/work/a b", "--no-container-mount-home",
                "--container-env=AWS_PROFILE,NCCL_DEBUG,TOOLKIT_IMAGE,TOOLKIT_SUPERVISOR,TOOLKIT_SUPERVISOR_TOKEN",
                "--more", "python3.12", *AGENT,
            ],
        ),
        (
            "apptainer",
            [
                "apptainer", "exec", "--nv", "--no-home", "--bind", "/data:/datasets", "--bind", "/scratch:/scratch",
                "--pwd", "/work/a b", "--more", "nvcr.io#nvidia/pytorch:26.01-py3", "python3.12", *AGENT,
            ],
        ),
        (
            "charliecloud",
            [
                "env", "-u", "TMPDIR", "ch-run", "--bind=/data:/datasets", "--bind=/scratch:/scratch",
                "--cd=/work/a b", "--more", "nvcr.io#nvidia/pytorch:26.01-py3", "--", "python3.12", *AGENT,
            ],
        ),
    ],
)  # fmt: skip
def test_the_ranks_run_in_a_container_and_srun_does_not(runtime: Any, expected: list[str], job: Any) -> None:
    container = Container(runtime=runtime, mounts=("/data:/datasets",), python="python3.12", args=("--more",))
    profile = Profile(gpus_per_node=2, env={"NCCL_DEBUG": "INFO"}, container=container)
    plan = Plan(job, profile, Nodes(), "nvcr.io#nvidia/pytorch:26.01-py3")
    words = srun(plan, "n1", binds=("/scratch",))
    assert words[:10] == [*SRUN, "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist=n1"]
    assert words[10:] == expected
    supervisor = plan.supervisor("job.yaml", "cluster.yaml")
    assert supervisor[:4] == [sys.executable, "-m", "toolkit", "supervise"], "the supervisor is outside"
    assert supervisor[-2:] == ["--container", "nvcr.io#nvidia/pytorch:26.01-py3"]


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "2:1", "1:", ":4", "1:2:3", "two", "1.5", "1-4", " 2", "²", "1234567", "0:4"]
)
def test_a_wrong_number_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="is neither a number of nodes, such as 2, nor a range, such as 1:4"):
        Nodes.parsed(text)


def test_numbers_of_nodes() -> None:
    assert [str(Nodes.parsed(text)) for text in ("1", "16", "1:4", "3:3")] == ["1", "16", "1:4", "3"]


@pytest.mark.parametrize(
    "options",
    [{"comment": "a\ntouch pwned #"}, {"comment": "a\rb"}, {"a\ntouch pwned\n#": 1}, {"bad key": 1}, {"": True}],
)
def test_no_option_can_leave_its_line_of_the_script(options: dict[str, Any], job: Any) -> None:
    with pytest.raises(JobError, match="one line of text"):
        Plan(job, Profile(sbatch=options), Nodes()).check()
    with pytest.raises(JobError, match="one line of text"):
        Plan(job, Profile(account="a\ntouch pwned"), Nodes()).check()


def test_more_ranks_than_samples_of_a_step_are_refused(job: Any) -> None:
    with pytest.raises(JobError, match="global_batch_size 32 is less than the 36 ranks"):
        Plan(job, Profile(gpus_per_node=4), Nodes(1, 9)).check()


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_shell_takes_values_as_they_are_and_runs_none_of_them(
    text: str, shell: str, job: Any, tmp_path: Path
) -> None:
    cwd = tmp_path / text.strip("\n")
    cwd.mkdir(exist_ok=True)
    plan = Plan(job, Profile(env={"A": text}, setup=("B=2", "export B")), Nodes())
    lines = plan.setup(str(cwd), [text, "/more"], code=text)
    program = "import os, sys; print([os.environ[name] for name in sys.argv[1:]], os.getcwd(), sep='\\n')"
    names = ["A", "B", "TOOLKIT_CODE", "PYTHONPATH", "PYTHONSAFEPATH"]
    call = f'{sys.executable} -c "{program}" {" ".join(names)}'
    done = subprocess.run(
        [shell, "-c", "\n".join([*lines, call])], env={"PYTHONPATH": "/before it"}, cwd=tmp_path, capture_output=True,
        text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout == f"{[text, '2', text, f'{text}:/more:/before it', '1']}\n{cwd}\n"
    assert not [path for path in tmp_path.rglob("*") if path.name == "pwned"]


def test_the_snapshot_is_found_before_what_the_profile_names(job: Any) -> None:
    lines = Plan(job, Profile(env={"PYTHONPATH": "/site", "TOOLKIT_CODE": "/x"}), Nodes()).setup(
        "/", ["/snap"], "/snap"
    )
    shown = subprocess.run(
        ["bash", "-c", "\n".join([*lines, "echo $PYTHONPATH $TOOLKIT_CODE"])], capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    assert shown.stdout == "/snap:/site /snap\n"


def test_modules_come_first_and_a_warning_kills_nobody_before_the_supervisor_listens(job: Any) -> None:
    lines = Plan(job, Profile(modules=("cuda/12.4",), setup=("ulimit -n 9",), env={"A": "1"}), Nodes()).setup("/tmp")
    assert lines == [
        'module load cuda/12.4 || { echo "module load cuda/12.4 has failed" >&2; exit 1; }', "ulimit -n 9",
        "export A=1", "cd /tmp || exit 1", "trap '' USR2  # until the supervisor listens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "cwd", "said"),
    [
        (Profile(modules=("cuda/99",)), "/", "module load cuda/99 has failed"),
        (Profile(), "/nowhere to be seen", "/nowhere to be seen: No such file"),
    ],
)
def test_what_the_supervisor_needs_and_does_not_get_ends_the_script(
    profile: Profile, cwd: str, said: str, job: Any
) -> None:
    lines = ["module() { false; }", *Plan(job, profile, Nodes()).setup(cwd), "echo trains"]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
