"""A run in containers is the run it would have been outside, whoever runs it and whatever stops it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Workplace, tensors_of
from tests.docker.conftest import Docker
from tests.slurm import charliecloud
from tests.store.servers import S3Server, used

pytestmark = pytest.mark.timeout(900)  # whichever test is the first has the image built
Equal = Callable[[Any, Any], bool]
ALONE = (
    "--read-only",
    "--tmpfs",
    "/tmp:exec",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
    "--network",
    "none",
)
SLOW = ("schedule.args.pause_s=0.05", "train.max_steps=200", "checkpoint.every_steps=20")
STEPS = 200
DIGITS = ("jobs/digits_mlp.yaml", "train.epochs=1")
README = (ROOT / "docker/README.md").read_text()


@contextlib.contextmanager
def container(docker: Docker, *words: object) -> Iterator[str]:
    """A container in the background, by its name; removed at the end."""
    name = f"toolkit-test-{uuid.uuid4().hex[:8]}"
    docker("run", "--detach", "--name", name, *words)
    try:
        yield name
    finally:
        docker("rm", "--force", name)


def until(reached: Callable[[], Any], what: str, timeout_s: float = 90) -> None:
    end_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < end_s, f"no {what} within {timeout_s:.0f} s"
        time.sleep(0.1)


def has_saved(run: Path, step: int) -> bool:
    return (run / f"checkpoints/step-{step:08d}").is_dir()


def here(place: Workplace) -> tuple[object, ...]:
    """docker run's options for the folder of a test, at its own path, as whoever runs the test."""
    user = f"{os.getuid()}:{os.getgid()}"
    return (
        "--user",
        user,
        "--env",
        "OMP_NUM_THREADS=1",
        "--volume",
        f"{place.folder}:{place.folder}",
        "--workdir",
        place.folder,
    )


def test_it_ends_as_outside_without_root_network_rights_and_a_disk_of_its_own(
    docker: Docker, image: str, workplace: Workplace, equal: Equal
) -> None:
    """As the user of the image, with nothing of the host but a folder for its runs."""
    job = (ROOT / "jobs/digits_mlp.yaml", "train.epochs=10")
    workplace.run("train", *map(str, job), "run.dir=outside")
    runs = workplace.folder / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    words = ("run", "--rm", *ALONE, "--env", "OMP_NUM_THREADS=1", "--volume", f"{runs}:/workspace/runs", image)
    said = docker(*words, "train", "jobs/digits_mlp.yaml", "train.epochs=10")
    assert "container:" not in said
    last = max(int(path.name[5:]) for path in (workplace.folder / "outside/checkpoints").glob("step-*"))
    assert equal(workplace.tensors("outside", last), tensors_of(str(runs / "digits_mlp"), last))
    facts = json.loads((runs / "digits_mlp/provenance.json").read_text())["attempts"][0]
    assert facts["image"] == image
    revision = docker("inspect", "--format", '{{index .Config.Labels "org.opencontainers.image.revision"}}', image)
    assert facts["image_commit"] == revision.strip()


@pytest.mark.parametrize("processes", [1, 2])
def test_docker_stop_is_a_saved_stop(
    docker: Docker, image: str, place: Workplace, equal: Equal, processes: int
) -> None:
    words = (*here(place), *ALONE, image, "train", "held.yaml", *SLOW, "--processes", processes)
    run = place.folder / "runs/held"
    with container(docker, *words) as name:
        until(lambda: has_saved(run, 40), "checkpoint")
        docker("stop", "--time", "60", name)
        assert docker("wait", name).strip() == "75"
        assert re.search(r"the same command goes on|run me again|stopped", docker("logs", name))
    stopped_at = place.status("runs/held")["step"]
    assert has_saved(run, stopped_at)
    assert stopped_at < STEPS
    fast = [word.replace("0.05", "0.0") for word in SLOW]
    said = docker("run", "--rm", *here(place), *ALONE, image, "train", "held.yaml", *SLOW, "--processes", processes)
    assert f"resuming at step {stopped_at}" in said
    place.run("train", "held.yaml", *fast, "run.dir=undisturbed", "--processes", str(processes))
    assert equal(place.tensors("runs/held", STEPS), place.tensors("undisturbed", STEPS))


def test_any_user_owns_the_files_of_the_run(docker: Docker, image: str, place: Workplace) -> None:
    for folder in (place.folder, *place.folder.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o755)
    place.folder.chmod(0o777)
    docker("run", "--rm", *here(place), "--user", "12345:12345", *ALONE, image, "train", "held.yaml")
    files = list((place.folder / "runs").rglob("*"))
    assert len(files) > 10
    assert {(path.stat().st_uid, path.stat().st_gid) for path in files} == {(12345, 12345)}


def test_two_containers_are_one_world_and_one_that_is_killed_comes_back(
    docker: Docker, image: str, place: Workplace, equal: Equal
) -> None:
    network = f"toolkit-test-{uuid.uuid4().hex[:8]}"
    docker("network", "create", "--internal", network)
    first = f"{network}-0"
    options = (*here(place), "--network", network, "--env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    words = ("torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3, "--rdzv-backend", "c10d",
             "--rdzv-id", "held", "--rdzv-endpoint", f"{first}:29400", "-m", "toolkit", "train", "held.yaml",
             *SLOW)  # fmt: skip
    run = place.folder / "runs/held"
    try:
        with (
            container(docker, *options, "--network-alias", first, image, *words) as one,
            container(docker, *options, image, *words) as other,
        ):
            until(lambda: has_saved(run, 40), "checkpoint")
            docker("kill", "--signal", "KILL", other)
            docker("start", other)
            assert docker("wait", one, other, timeout_s=200).split() == ["0", "0"], docker("logs", one)
            assert "resuming at step" in docker("logs", one) + docker("logs", other)
    finally:
        docker("network", "rm", network)
    place.run("train", "held.yaml", *SLOW[1:], "run.dir=undisturbed", "--processes", "2")
    assert equal(place.tensors("runs/held", STEPS), place.tensors("undisturbed", STEPS))


def test_the_run_can_lie_on_a_store_whose_keys_stand_in_no_command_line(
    docker: Docker, image: str, place: Workplace, tmp_path: Path, equal: Equal
) -> None:
    recorder = place.folder / "docker"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>words\nexec {shutil.which(docker.program)} "$@"\n')
    recorder.chmod(0o755)
    with S3Server(tmp_path / "s3") as server, used(server.environment):
        url = f"{server.fresh_url()}/held"
        command = (ROOT / "docker/run", "--network", "host", image, "train", "held.yaml", f"run.dir={url}")
        keys = server.environment | {"OMP_NUM_THREADS": "1", "DOCKER": str(recorder)}
        assert "completed at step 40" in docker.said(*command, cwd=place.folder, env=keys)
        words = (place.folder / "words").read_text().splitlines()
        assert "AWS_SECRET_ACCESS_KEY" in words
        assert not [word for word in words if keys["AWS_SECRET_ACCESS_KEY"] in word]
        place.run("train", "held.yaml", "run.dir=outside")
        assert equal(tensors_of(url, 40), place.tensors("outside", 40))


def test_small_shared_memory_is_explained_before_anything_is_written(
    docker: Docker, image: str, place: Workplace
) -> None:
    words = ("run", "--rm", *here(place), "--shm-size", "64k", image, "train", "held.yaml", "data.workers=2")
    said = docker(*words, status=2)
    assert re.search(r"data\.workers=2 hand on up to .* through /dev/shm, where 0\.1 MiB are free; give the", said)
    assert not (place.folder / "runs").exists()
    docker(*words, "data.workers=0")


def test_a_run_that_would_vanish_with_the_container_is_said(docker: Docker, image: str) -> None:
    said = docker("run", "--rm", "--network", "none", image, "train", "--processes", "1", *DIGITS)
    assert "container: the run runs/digits_mlp lies in the container and vanishes with it: mount a folder there" in said
    assert '-v "$PWD/runs:/workspace/runs"' in said
    assert "completed" in said


def test_a_folder_that_is_not_the_users_is_said(docker: Docker, image: str, place: Workplace) -> None:
    (place.folder / "runs").mkdir(mode=0o700)
    mount = f"{place.folder}/runs:/workspace/runs"
    words = ("run", "--rm", "--user", "12345:12345", "--volume", mount, image, "train", "jobs/digits_mlp.yaml")
    said = docker(*words, status=2)
    assert (
        "container: the run runs/digits_mlp cannot be written: /workspace/runs belongs to user "
        f"{os.getuid()} and this is user 12345"
    ) in said
    assert "Traceback" not in said


def test_what_is_killed_in_it_leaves_no_zombie(docker: Docker, image: str) -> None:
    """An orphan is reaped by the init, which a run of days needs."""
    script = "(sleep 0.2 &) ; sleep 1; grep -l 'State:.Z' /proc/[0-9]*/status; cat /proc/1/comm"
    assert docker("run", "--rm", "--network", "none", image, "bash", "-c", script) == "tini\n"


def test_make_docker_train_trains_in_this_folder(docker: Docker, image: str, place: Workplace) -> None:
    folder = place.folder
    make = ("make", "-C", ROOT, "docker-train")
    job = f"JOB=jobs/digits_mlp.yaml run.dir={folder}/x train.epochs=1"
    said = docker.said(*make, f"IMAGE={image}", job, f"RUN=--volume {folder}:{folder}")
    assert "completed at step" in said
    assert (folder / "x/status.json").stat().st_uid == os.getuid()
    said = docker.said(*make, "IMAGE=toolkit-test-no-such", status=2)
    assert "there is no image toolkit-test-no-such; build it: make docker-build" in said


@pytest.mark.campaign
def test_a_folder_made_of_it_runs_under_charliecloud(
    docker: Docker, image: str, place: Workplace, tmp_path: Path
) -> None:
    """As docker/README.md makes one: what Slurm's nodes are given where there is neither pyxis nor Apptainer."""
    charliecloud.install()
    folder = tmp_path / "toolkit.img"
    (script,) = re.findall(r"# Charliecloud: a folder\n(.*?)toolkit submit", README, re.DOTALL)
    script = script.replace("docker ", f"{docker.program} ").replace("export toolkit\n", f"export {image}\n")
    docker.said("bash", "-euo", "pipefail", "-c", script, cwd=tmp_path)
    bind = ("--bind", f"{place.folder}:/workspace/runs", "--cd", "/workspace/runs")
    words = ("env", "USER=tester", "ch-run", *bind, folder, "--", "/opt/venv/bin/toolkit", "train", "held.yaml")
    said = docker.said(*words, cwd=place.folder)
    assert "completed at step 40" in said
    assert place.status("runs/held")["state"] == "completed"


def test_a_signal_to_docker_run_stops_the_run_with_all_saved(docker: Docker, image: str, place: Workplace) -> None:
    words = [ROOT / "docker/run", image, "train", "held.yaml", *SLOW]
    with subprocess.Popen(words, cwd=place.folder, env=os.environ | docker.environment) as process:
        try:
            until(lambda: has_saved(place.folder / "runs/held", 20), "checkpoint")
        finally:
            process.terminate()
        assert process.wait(90) == 75
    assert place.status("runs/held")["state"] == "preempted"


def test_scripts_find_what_lies_beside_them_and_runs_know_the_commit(
    docker: Docker, image: str, place: Workplace
) -> None:
    place.write("script.py", "import held\nprint(held.schedule(0, 1))\n")
    assert docker.said(ROOT / "docker/run", image, "python", "script.py", cwd=place.folder).endswith("1.0\n")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in ((*git, "init", "-q"), (*git, "add", "held.py"), (*git, "commit", "-qm", "x")):
        docker.said(*words, cwd=place.folder)
    docker.said(ROOT / "docker/run", image, "train", "held.yaml", "train.max_steps=2", cwd=place.folder)
    provenance = json.loads((place.folder / "runs/held/provenance.json").read_text())
    assert provenance["attempts"][0]["git_commit"] == docker.said("git", "rev-parse", "HEAD", cwd=place.folder).strip()


def test_what_docker_run_cannot_hand_over_is_refused_in_words(docker: Docker, image: str, place: Workplace) -> None:
    def refused(**environment: str) -> str:
        command = (ROOT / "docker/run", image, "train", "held.yaml")
        return docker.said(*command, cwd=place.folder, env=environment, status=2)

    assert "DATA is nowhere, which is no folder here" in refused(DATA="nowhere")
    said = refused(GOOGLE_APPLICATION_CREDENTIALS="key.json")
    assert "GOOGLE_APPLICATION_CREDENTIALS names key.json, which is no file" in said
    assert "Docker does not answer" in refused(DOCKER_HOST="unix:///nowhere.sock")
    assert not (place.folder / "runs").exists()
