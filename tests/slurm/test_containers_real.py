"""A job in containers, for real: Charliecloud on the testbed, with no Slurm command in the image."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from tests.campaigns.cluster import FAULTS, Fault, Scene, outcome_of, scene_in, suffer, undisturbed
from tests.campaigns.faults import Outcome
from tests.conftest import ROOT
from tests.slurm import charliecloud
from toolkit import storage

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hunter2-of-the-store"  # noqa: S105
# What lies in the image as toolkit: whoever runs it has not got what was submitted.
COPY = "raise SystemExit('this is the copy of toolkit in the image')\n"


@pytest.fixture(scope="module")
def place(testbed: None) -> Iterator[Path]:
    """A folder that all nodes see, and that a container sees only if it is mounted there: not below /tmp."""
    with tempfile.TemporaryDirectory(prefix="toolkit-containers-", dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def image(place: Path) -> Iterator[charliecloud.Image]:
    charliecloud.install()
    with charliecloud.image(place / "image", str(ROOT), str(place / "runs")) as made:
        packages = next(Path(made.folder + made.python).parents[1].glob("lib/python*/site-packages"))
        (packages / "toolkit").mkdir()
        (packages / "toolkit/__init__.py").write_text(COPY)
        (Path(made.folder) / "ch/environment").write_text(f"TOOLKIT_IMAGE_COMMIT={COMMIT}\n")
        yield made


@pytest.fixture(scope="module")
def expected(place: Path) -> Outcome:
    """What the run comes to on this machine, outside of containers."""
    (place / "runs").mkdir()
    return undisturbed(place / "runs/undisturbed")


def options(place: Path, image: charliecloud.Image, *mounts: str, name: str = "") -> tuple[str, ...]:
    """Of `toolkit submit`: the testbed's profile, and how containers are run there."""
    profile = yaml.safe_load((ROOT / "slurm/testbed.yaml").read_text())
    profile["env"] |= {"NCCL_DEBUG": "WARN"}
    profile["container"] = {
        "runtime": "charliecloud",
        "mounts": [*image.mounts, str(place / "runs"), *mounts],
        "python": image.python,
        "args": ["--set-env"],  # what the image says of its environment, in /ch/environment
    }
    (place / "containers.yaml").write_text(yaml.safe_dump(profile))
    return "--cluster", str(place / "containers.yaml"), "--container", name or image.folder


def committed(folder: Path) -> str:
    """Make a repository of a folder, with this toolkit in it. Returns the commit."""
    shutil.copytree(ROOT / "toolkit", folder / "toolkit", ignore=shutil.ignore_patterns("__pycache__"))
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    (folder / ".gitignore").write_text("runs/\nhold-*\nheld-*\ntaken\n__pycache__/\n")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "mine"]):
        subprocess.run(["git", *words], cwd=folder, check=True, timeout=60)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, timeout=60, capture_output=True)
    return done.stdout.decode().strip()


def running(scene: Scene, *parts: str) -> list[dict[str, str]]:
    """The environments of the run's processes in containers."""
    found = [psutil.Process(pid).environ() for pid in scene.pids(*parts)]
    return [one for one in found if "CH_RUNNING" in one]


def test_it_runs_what_was_submitted_and_ends_as_outside(
    place: Path, image: charliecloud.Image, expected: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene_in(place / "runs/snapshot") as scene:
        commit = committed(scene.folder)
        (scene.folder / "runs").mkdir()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("TMPDIR", str(scene.folder / "runs"))
        scene.hold()
        scene.submit(*options(place, image))
        scene.wait_until_held()
        ranks, agents = running(scene, "-m toolkit train"), running(scene, "-m toolkit.cluster.agent")
        lines = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
        scene.release()
        scene.wait_for_the_end()
        assert outcome_of(scene).same(expected)

        inside = [one for one in ranks if "RANK" in one]
        assert sorted(one["RANK"] for one in inside) == ["0", "1", "2", "3"]
        for one in inside:
            assert (one["OMP_NUM_THREADS"], one["NCCL_DEBUG"], one["AWS_SECRET_ACCESS_KEY"]) == ("1", "WARN", SECRET)
            assert "TMPDIR" not in one, "/tmp is the container's"
            assert "TOOLKIT_SUPERVISOR_TOKEN" not in one
        assert len(agents) == 2
        (token,) = {one["TOOLKIT_SUPERVISOR_TOKEN"] for one in agents}
        for words in (token, SECRET):
            assert not any(words in line for line in lines), "all users of a node can read command lines"
            files = [path for path in scene.folder.rglob("*") if path.is_file() and words.encode() in path.read_bytes()]
            assert not files

        (attempt,) = scene.run.provenance()["attempts"]
        told = {key: attempt[key] for key in ("git_commit", "git_diff", "image", "image_commit")}
        assert told == {"git_commit": commit, "git_diff": "", "image": image.folder, "image_commit": COMMIT}
        assert {host[0] for host in attempt["hosts"]} == {"n"}
        assert len(set(attempt["hosts"])) == 2


def fault(name: str) -> Fault:
    (found,) = [one for one in FAULTS if one.name == name]
    return found


@pytest.mark.parametrize(
    "name",
    [
        "scontrol requeue",
        pytest.param("time limit", marks=pytest.mark.campaign),
        pytest.param("slurmstepd killed", marks=pytest.mark.campaign),
        pytest.param("rank 3 killed", marks=pytest.mark.campaign),
        pytest.param("supervisor killed", marks=pytest.mark.campaign),
    ],
)
def test_what_befalls_it_is_seen_to_from_outside(
    place: Path, image: charliecloud.Image, expected: Outcome, name: str
) -> None:
    look = "import shutil; print(*[shutil.which(name) for name in ('scontrol', 'srun', 'sbatch', 'env')])"
    words = ["ch-run", *[f"--bind={mount}" for mount in image.mounts], image.folder, "--", image.python, "-c", look]
    found = subprocess.run(
        words, env={"PATH": os.environ["PATH"], "USER": "me"}, capture_output=True, timeout=30, check=True
    )
    assert found.stdout.split() == [b"None", b"None", b"None", b"/usr/bin/env"]
    one = fault(name)
    more = options(place, image, str(ROOT))
    suffer(replace(one, options=(*one.options, *more)), place / "runs" / name.replace(" ", "-"), expected)


def test_an_image_that_does_not_exist_is_named_and_not_tried_for_ever(place: Path, image: charliecloud.Image) -> None:
    (place / "runs").mkdir(exist_ok=True)
    with scene_in(place / "runs/no-image") as scene:
        scene.submit(*options(place, image, str(ROOT), name="/images/none"))
        status = scene.run.status
        scene.wait_for(lambda: (status() or {}).get("state") == "failed" and not scene.in_queue(), "the end", 180)
        page = storage.read(scene.run.at("postmortem.md")).decode()
        assert re.search(r"torchrun said:;? nothing in image /images/none; srun said:", page), page
        assert scene.said().count("starting 2 ranks each") <= 2
