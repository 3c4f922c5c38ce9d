"""What is typed to run a command in a container; and one that is really run, as Charliecloud needs no daemon."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, ROOT
from tests.slurm import charliecloud
from toolkit.cluster.containers import RUNTIMES, additions, handed_in, wrapped
from toolkit.cluster.plan import Nodes, Plan
from toolkit.cluster.profile import Profile
from toolkit.config import load_job
from toolkit.errors import JobError

COMMAND = ["python3", "-m", "toolkit", "train", "a b.yaml"]
NAMES = ["PYTHONPATH", "OMP_NUM_THREADS", "AWS_SECRET_ACCESS_KEY"]


@dataclass(frozen=True)
class Container:
    runtime: str
    mounts: tuple[str, ...] = ()
    args: tuple[str, ...] = ()


def typed(container: Container, image: str = "/i", binds: Any = (), names: Any = (), **more: Any) -> Any:
    return wrapped(COMMAND, container, image, binds, names, "/home/me/a b", **more)


def test_pyxis_is_flags_on_srun() -> None:
    container = Container("pyxis", ("/data:/datasets", "/scratch"), ("--container-remap-root",))
    assert typed(container, "nvcr.io#nvidia/pytorch:26.01-py3", ["/home/me", "/scratch/snapshots/1"], NAMES) == (
        [
            "--container-image=nvcr.io#nvidia/pytorch:26.01-py3",
            "--container-mounts=/data:/datasets,/home/me:/home/me,/scratch:/scratch",
            "--container-workdir=/home/me/a b",
            "--no-container-mount-home",
            "--container-env=AWS_SECRET_ACCESS_KEY,OMP_NUM_THREADS,PYTHONPATH",
            "--container-remap-root",
        ],
        COMMAND,
    )
    bare = ["--container-image=/i.sqsh", "--container-workdir=/home/me/a b", "--no-container-mount-home"]
    assert typed(Container("pyxis"), "/i.sqsh", gpus=True) == (bare, COMMAND)
    home = ("--container-mount-home",)  # which pyxis does not take beside its opposite
    assert typed(Container("pyxis", args=home), "/i.sqsh") == ([*bare[:2], *home], COMMAND)


@pytest.mark.parametrize("gpus", [True, False])
def test_apptainer_is_words_before_the_command(gpus: bool) -> None:
    container = Container("apptainer", ("/data:/datasets",), ("--writable-tmpfs",))
    words = (
        "--no-home --bind /data:/datasets --bind /home/me/a b:/home/me/a b --pwd /home/me/a b --writable-tmpfs /i.sif"
    )
    expected = ["apptainer", "exec", *["--nv"] * gpus, *words.replace("a b", "a\0b").split(" "), *COMMAND]
    flags, found = typed(container, "/i.sif", ["/home/me/a b"], NAMES, gpus=gpus)
    assert (flags, found) == ([], [word.replace("\0", " ") for word in expected])


def test_charliecloud_is_words_before_the_command() -> None:
    container = Container("charliecloud", ("/data:/datasets", "/scratch"), ("--write",))
    binds = ["/scratch/snapshots/1", "/home/me/a, b", "/tmp/run"]
    assert typed(container, "/images/torch", binds, NAMES, gpus=True) == (
        [],
        ["env", "-u", "TMPDIR", "ch-run", "--bind=/data:/datasets", "--bind=/home/me/a, b:/home/me/a, b",
         "--bind=/scratch:/scratch", "--cd=/home/me/a b", "--write", "/images/torch", "--", *COMMAND],
    )  # fmt: skip


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_no_value_of_a_variable_is_on_a_command_line(runtime: str) -> None:
    container, environment = Container(runtime), {"AWS_SECRET_ACCESS_KEY": "hunter2", "USER": "me", "HOME": "/home/me"}
    names = handed_in(environment)
    assert names == ["AWS_SECRET_ACCESS_KEY"]
    assert "hunter2" not in str(typed(container, names=names))
    assert (
        additions(container, environment, names)
        == {
            "pyxis": {},
            "apptainer": {"APPTAINERENV_AWS_SECRET_ACCESS_KEY": "hunter2"},
            "charliecloud": {"USER": "me"},
        }[runtime]
    )


def test_what_is_handed_in_is_what_the_job_needs_and_not_what_the_image_knows_better() -> None:
    needed = """AWS_ENDPOINT_URL GLOO_SOCKET_IFNAME GOOGLE_APPLICATION_CREDENTIALS NCCL_DEBUG OMP_NUM_THREADS PYTHONPATH
        PYTHONSAFEPATH TOOLKIT_CODE TOOLKIT_IMAGE https_proxy"""
    others = "PATH LD_LIBRARY_PATH HOME TOOLKIT_IMAGE_COMMIT PYTHONHOME CUDA_VISIBLE_DEVICES RANK"
    assert handed_in([*others.split(), *needed.split()]) == needed.split()


def test_what_lies_in_another_mount_comes_after_it_and_only_if_it_is_not_there_already() -> None:
    container = Container("pyxis", ("/fast:/work/data", "/work", "/work/x", "/work/data/y", "/workshop"))
    (_, mounts, *_), _ = typed(container)
    assert mounts == "--container-mounts=/work:/work,/fast:/work/data,/work/data/y:/work/data/y,/workshop:/workshop"


@pytest.mark.parametrize(
    ("runtime", "bind", "told"),
    [
        ("pyxis", "/a,b", r"pyxis cannot mount a path with ',' in it"),
        ("pyxis", "/a b", r"pyxis cannot mount a path with ' ' in it"),
        ("pyxis", "/a\\040b", r"cannot mount a path with"),
        ("pyxis", "/a:/b c", r"cannot mount a path with ' '"),
        ("apptainer", "/a,b", r"apptainer cannot mount a path with ',' in it"),
        ("charliecloud", "/a\nb", r"charliecloud cannot mount a path with '\\n'"),
        ("charliecloud", "/a:b", r"'/a:b': give PATH or SRC:DST, both absolute; a path with a colon cannot be mounted"),
        ("apptainer", "/a:/b:ro", r"give PATH or SRC:DST"),
        ("pyxis", "data", r"'data': give PATH or SRC:DST, both absolute"),
        ("pyxis", "", r"give PATH or SRC:DST"),
        ("pyxis", "/other:/data", r"mounts '/data' and '/other' have one place, '/data'; keep one"),
    ],
)
def test_a_mount_that_cannot_be_expressed_is_refused(runtime: str, bind: str, told: str) -> None:
    with pytest.raises(JobError, match=told):
        typed(Container(runtime, ("/data",)), binds=[bind])


@pytest.mark.parametrize(
    ("runtime", "image", "told"),
    [
        ("pyxis", "nvcr.io/nvidia/pytorch:26.01", r"wants a # after the registry: nvcr\.io#nvidia/pytorch:26\.01"),
        ("pyxis", "localhost/x", r"localhost#x"),
        ("apptainer", "./i.sif", r"absolute path, which is the same on every node"),
        ("apptainer", "--fakeroot", r"'--fakeroot' is no image"),
        ("charliecloud", "", r"'' is no image"),
        ("docker", "x", r"runtime 'docker' is not known; it is one of pyxis, apptainer, charliecloud"),
    ],
)
def test_an_image_that_cannot_be_is_refused(runtime: str, image: str, told: str) -> None:
    with pytest.raises(JobError, match=told):
        typed(Container(runtime), image)


@pytest.mark.parametrize(
    "image", ["ubuntu:24.04", "nvidia/cuda:13", "docker://nvcr.io#x/y", "/a/b.c/i.sqsh", "me@reg:5000#x"]
)
def test_images_that_pyxis_knows_are_left_as_they_are(image: str) -> None:
    (flag, *_), _ = typed(Container("pyxis"), image)
    assert flag == f"--container-image={image}"


# Hands over no variable but those it is told of, as sudo does.
SUDO = """#!/bin/bash
kept=()
if [[ $1 = --preserve-env=* ]]; then
    IFS=, read -ra names <<<"${1#*=}"
    for name in "${names[@]}"; do kept+=("$name=${!name}"); done
    shift
fi
exec env -i "PATH=$PATH" "${kept[@]}" "$@"
"""
ENGINE = """#!/bin/bash
case $1 in
    run) printf '%s\n' "$@" >words; env >variables; until [ -e told ]; do sleep 0.05; done; exit 75 ;;
    ps) [ ! -e words ] || grep -qxF "${4#label=}" words && echo 1234 ;;
    kill) [ "$*" = "kill --signal TERM 1234" ] && touch told ;;
esac
"""


def test_docker_run_brings_in_a_job_that_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text(ENGINE.replace("until [ -e told ]; do sleep 0.05; done; exit 75", "exit 0"))
    (tmp_path / "docker").chmod(0o755)
    for name in ("work", "jobs"):
        (tmp_path / name).mkdir()
    for name in ("there.yaml", "work/here.yaml", "jobs/linked.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "work/jobs").symlink_to(tmp_path / "jobs")
    job_files = ["here.yaml", "../there.yaml", "jobs/linked.yaml", "none.yaml"]
    environment = os.environ | {"DOCKER": str(tmp_path / "docker"), "GPUS": "none"}
    command = [ROOT / "docker/run", "toolkit", "train", *job_files]
    subprocess.run(command, cwd=tmp_path / "work", env=environment, check=True, timeout=30)
    words = (tmp_path / "work/words").read_text().splitlines()
    mounted = re.findall(r"src=(.*\.yaml)", "\n".join(words).replace('"', ""))
    assert [path.split(",")[0] for path in mounted] == [f"{tmp_path}/there.yaml", f"{tmp_path}/jobs/linked.yaml"]


def test_docker_run_under_sudo_hands_over_keys_and_is_stopped_through_docker(tmp_path: Path) -> None:
    for name, script in (("sudo", SUDO), ("docker", ENGINE)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "not-permitted").write_text("kill() { return 1; }\n")  # sudo's process is root's
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "DOCKER": "sudo docker", "GPUS": "none",
        "BASH_ENV": "not-permitted", "AWS_SECRET_ACCESS_KEY": "hunter2", "HTTPS_PROXY": "there", "MINE": "alone",
    }  # fmt: skip
    with subprocess.Popen([ROOT / "docker/run", "toolkit", "train"], cwd=tmp_path, env=environment) as process:
        try:
            until(lambda: (tmp_path / "variables").exists() and (tmp_path / "variables").read_text())
            process.send_signal(signal.SIGINT)  # the terminal tells Docker, too
            time.sleep(0.2)
            assert process.poll() is None
            process.terminate()
            assert process.wait(20) == 75
        finally:
            (tmp_path / "told").touch()
    variables = (tmp_path / "variables").read_text()
    assert "AWS_SECRET_ACCESS_KEY=hunter2\n" in variables
    assert "HTTPS_PROXY=there\n" in variables
    assert "MINE" not in variables
    words = (tmp_path / "words").read_text()
    assert "--env\nAWS_SECRET_ACCESS_KEY\n" in words
    assert "hunter2" not in words


def until(reached: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.02)


STEP = (
    "srun --overlap --kill-on-bad-exit=1 --mpi=none --cpu-bind=none --export=ALL --nodes=2 --ntasks=2 "
    "--ntasks-per-node=1 --nodelist=a1,a2 --cpus-per-task=24"
)
NAMED = (
    "AWS_SECRET_ACCESS_KEY,NCCL_DEBUG,PYTHONPATH,TOOLKIT_CODE,TOOLKIT_IMAGE,TOOLKIT_SUPERVISOR,TOOLKIT_SUPERVISOR_TOKEN"
)


@pytest.mark.parametrize(
    ("runtime", "image", "typed"),
    [
        (
            "pyxis",
            "nvcr.io#nvidia/pytorch:26.01-py3",
            f"{STEP} --container-image=nvcr.io#nvidia/pytorch:26.01-py3 "
            "--container-mounts=/data:/datasets,/home/me:/home/me,/scratch:/scratch --container-workdir=/home/me "
            f"--no-container-mount-home --container-env={NAMED} --container-writable python3 -m toolkit.cluster.agent",
        ),
        (
            "apptainer",
            "/images/torch.sif",
            f"{STEP} apptainer exec --nv --no-home --bind /data:/datasets --bind /home/me:/home/me "
            "--bind /scratch:/scratch --pwd /home/me --writable /images/torch.sif python3 -m toolkit.cluster.agent",
        ),
        (
            "charliecloud",
            "/images/torch",
            f"{STEP} env -u TMPDIR ch-run --bind=/data:/datasets --bind=/home/me:/home/me --bind=/scratch:/scratch "
            "--cd=/home/me --write /images/torch -- python3 -m toolkit.cluster.agent",
        ),
    ],
)
def test_the_whole_step_of_a_job_in_containers(tmp_path: Path, runtime: str, image: str, typed: str) -> None:
    (tmp_path / "job.yaml").write_text(DIGITS)
    more = {"pyxis": "--container-writable", "apptainer": "--writable", "charliecloud": "--write"}[runtime]
    container = {"runtime": runtime, "mounts": ["/data:/datasets", "/scratch"], "args": [more]}
    profile = {"gpus_per_node": 2, "cpus_per_gpu": 12, "env": {"NCCL_DEBUG": "WARN"}, "container": container}
    job = load_job(str(tmp_path / "job.yaml"), ["run.dir=/scratch/runs/me"], {})
    plan = Plan(job, Profile.model_validate(profile), Nodes(2, 2), image)
    outside = {"PYTHONPATH": "/snapshot", "TOOLKIT_CODE": "/snapshot", "AWS_SECRET_ACCESS_KEY": "hunter2", "USER": "me"}
    assert " ".join(plan.srun(["a1", "a2"], ["/scratch/runs/me", "/home/me"], "/home/me", outside)) == typed
    added = plan.additions(outside)
    assert added["TOOLKIT_IMAGE"] == image
    assert added.get("APPTAINERENV_TOOLKIT_IMAGE") == (image if runtime == "apptainer" else None)


@pytest.fixture(scope="module")
def image() -> Iterator[charliecloud.Image]:
    """Skips where ch-run is not installed or may make no user namespace, but not on CI's machine."""
    ci = os.environ.get("CI") == "true"
    if ci:
        charliecloud.install()
    elif not shutil.which("ch-run"):
        pytest.skip("ch-run is not here: apt-get install charliecloud-runtime")
    with charliecloud.image(Path(tempfile.gettempdir()) / f"image-{os.getpid()}", str(ROOT)) as made:
        words = ["ch-run", *[f"--bind={mount}" for mount in made.mounts], made.folder, "--", "/bin/true"]
        environment = {"PATH": os.environ["PATH"], "USER": "me"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            (pytest.fail if ci else pytest.skip)(f"no container can be run here: {done.stderr.strip()}")
        yield made


@pytest.mark.parametrize("user", [0, 65534])
def test_a_command_is_really_run_in_a_container(image: charliecloud.Image, user: int) -> None:
    if user != os.geteuid() and os.geteuid() != 0:
        pytest.skip("only root can be another user")
    code = "import os, torch, toolkit; print(os.getuid(), os.getcwd(), toolkit.__file__, os.environ['CH_RUNNING'][:5])"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": "/nowhere"}
    container = Container("charliecloud", image.mounts)
    names = handed_in(environment)
    _, words = wrapped([image.python, "-c", code], container, image.folder, [str(ROOT), "/tmp"], names, str(ROOT))
    done = subprocess.run(
        words,
        env=environment | additions(container, environment, names),
        user=user,
        group=user,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(user), str(ROOT), str(ROOT / "toolkit/__init__.py"), "Weird"]
