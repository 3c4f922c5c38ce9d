"""GPUs in containers, on a machine that may have none: what Docker, its NVIDIA hook and the entrypoint make of them."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workplace
from tests.docker.conftest import BASE_FOLDER, Docker, engine

pytestmark = pytest.mark.timeout(900)  # whichever test is the first has the image built
RUN = ROOT / "docker/run"
TRAIN = ("train", "held.yaml", "train.max_steps=2")
NO_GPU = not any(Path("/dev").glob("nvidia[0-9]*"))
# Stands for NVIDIA's: Docker runs it as a prestart hook of every container with --gpus, once it is on dockerd's PATH.
HOOK = f"""#!/bin/sh
cat >/dev/null
date >>{BASE_FOLDER}/bin/called
"""
# Stands for the driver's: a file by whose name the entrypoint finds it, and one function.
DRIVER = """
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
"""


@pytest.fixture
def gpu(docker: Docker, devel: str, place: Workplace) -> tuple[str, ...]:
    """docker run's options for a container that sees a GPU whose driver is for CUDA 12.4."""
    place.write("driver.c", DRIVER)
    folder = str(place.folder)
    here = ("--user", f"{os.getuid()}:{os.getgid()}", "--volume", f"{folder}:{folder}", "--workdir", folder)
    docker("run", "--rm", *here, "--entrypoint", "gcc", devel, "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c")
    return (*here, "--env", f"LD_LIBRARY_PATH={folder}", "--device", "/dev/null:/dev/nvidia0")


@pytest.mark.skipif(not NO_GPU, reason="this machine has GPUs")
def test_a_machine_without_gpus_is_said_and_trains_on_its_cpu(docker: Docker, image: str, place: Workplace) -> None:
    folder = place.folder / 'a "b", $(touch pwned) ü'  # no name of a folder is too much for docker/run
    folder.mkdir()
    for name in ("held.py", "held.yaml"):
        shutil.move(place.folder / name, folder)
    said = docker.said(RUN, image, *TRAIN, cwd=folder)
    assert {path.name for path in folder.iterdir()} == {"held.py", "held.yaml", "runs", "__pycache__"}
    assert "no GPU on this machine: training on its CPU" in said
    assert "container:" not in said
    assert "completed at step 2" in said


@pytest.mark.skipif(not NO_GPU, reason="this machine has GPUs")
def test_gpus_that_docker_cannot_hand_over_are_explained(docker: Docker, image: str, place: Workplace) -> None:
    said = docker.said(RUN, image, *TRAIN, cwd=place.folder, env={"GPUS": "all"}, status=125)
    assert "install\nNVIDIA's container toolkit on this machine" in said
    assert not (place.folder / "runs").exists()


@pytest.fixture
def nvidia(docker: Docker) -> Iterator[None]:
    """The engine with a hook as NVIDIA's container toolkit installs it."""
    if not docker.is_ours:
        missing = "only an engine of the tests' own can be given a stub of NVIDIA's hook"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    hook = Path(BASE_FOLDER) / "bin/nvidia-container-runtime-hook"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(HOOK)
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    try:
        engine("down")
        engine("up")
        yield
    finally:
        for path in hook.parent.iterdir():
            path.unlink()
        engine("down")
        engine("up")


@pytest.mark.skipif(not NO_GPU, reason="this machine has GPUs")
def test_gpus_arrive_as_asked_for(nvidia: None, docker: Docker, image: str, place: Workplace) -> None:
    words = ("run", "--rm", "--network", "none", "--gpus")
    shown = "echo $NVIDIA_VISIBLE_DEVICES"
    assert docker(*words, "all", image, "bash", "-c", shown) == "all\n"
    assert docker(*words, "device=1", image, "bash", "-c", shown) == "1\n"
    for gpus, arrived in (("all", "all"), ("device=0,3", "0,3")):
        said = docker.said(RUN, image, *TRAIN, cwd=place.folder, env={"GPUS": gpus})
        assert (
            f"container: no GPU is visible, though NVIDIA_VISIBLE_DEVICES is {arrived}: the CPU will do the work"
            in said
        )
        assert "complete" in said
    assert len((Path(BASE_FOLDER) / "bin/called").read_text().splitlines()) == 4


def test_a_driver_that_is_too_old_is_said(docker: Docker, image: str, devel: str, gpu: tuple[str, ...]) -> None:
    for name, cuda, says in ((image, "13.0", True), (devel, "13.0", True), (image, "12.8", False)):
        said = docker("run", "--rm", *gpu, "--env", f"TOOLKIT_CUDA={cuda}", name, *TRAIN)
        words = f"the machine's driver is too old: it is for CUDA 12.4, and the image's torch for CUDA {cuda}"
        assert (words in said) == says
        assert "too old" not in said or says


def test_gpus_that_the_images_torch_cannot_use_are_said(docker: Docker, image: str, gpu: tuple[str, ...]) -> None:
    said = docker("run", "--rm", *gpu, "--env", "TOOLKIT_CUDA=", image, *TRAIN)
    assert "GPUs are visible, but the image's torch is built without CUDA: the CPU will do the work" in said
