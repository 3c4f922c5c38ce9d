"""What tests of the image share: an engine, the image built in it, and a folder in which `docker/run` is typed.

An engine that answers `docker info` is used as it is. Where there is none, tests/docker/engine starts one of its own,
as root, and makes the base image that it could pull nowhere.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import DIGITS, ROOT, Workplace

ENGINE = ROOT / "tests/docker/engine"
IMAGE, BASE = "toolkit-test", "toolkit-test/base"
BASE_FOLDER = "/var/lib/toolkit-docker"  # the engine's
# A schedule that takes its time, so that something can happen to the run, and still makes the same steps.
HELD = """
import time


def schedule(step, total_steps, pause_s=0.0):
    time.sleep(pause_s)
    return 1.0
"""


@dataclass(frozen=True)
class Docker:
    """The command `docker`, for one engine."""

    program: str
    environment: dict[str, str]
    is_ours: bool = False

    def __call__(self, *words: object, status: int = 0, timeout_s: float = 300, **options: Any) -> str:
        """What `docker WORDS` says on stdout and stderr. It must end with `status`."""
        return self.said(self.program, *words, status=status, timeout_s=timeout_s, **options)

    def said(self, *command: object, status: int = 0, timeout_s: float = 300, **options: Any) -> str:
        """What any command says that is to use this engine, such as docker/run."""
        environment = os.environ | self.environment | options.pop("env", {})
        words = [str(word) for word in command]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL} | options
        done = subprocess.run(words, env=environment, text=True, timeout=timeout_s, check=False, **options)
        assert done.returncode == status, f"{' '.join(words)}: exit {done.returncode}, not {status}\n{done.stdout}"
        return done.stdout or ""

    def build(self, *options: object, target: str = "runtime", image: str = IMAGE, root: Path = ROOT) -> str:
        """`docker/build`."""
        with self.build_options() as more:
            words = (root / "docker/build", "--target", target, *more, *options)
            return self.said(*words, timeout_s=900, env={"IMAGE": image})

    @contextlib.contextmanager
    def build_options(self) -> Iterator[list[str]]:
        """With them a build takes the torch that pip installs on this machine, from where pip has its packages here."""
        with found_by_pip() as config:
            base = ["--build-arg", f"BASE_IMAGE={BASE}"] if self.is_ours else []
            cuda = ["--build-arg", f"CUDA={torch.version.cuda or ''}"]
            yield ["--network", "host", "--progress", "plain", "--secret", f"id=pip.conf,src={config}", *cuda, *base]


@contextlib.contextmanager
def found_by_pip() -> Iterator[Path]:
    """pip's configuration for a build: folders of wheels on this machine are served to it from its loopback address."""
    told = subprocess.run(["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = {
        key.partition(".")[2]: value.strip("'") for key, _, value in (line.partition("=") for line in told.splitlines())
    }
    lines = ["[global]", f"# {CANARY}"]
    with contextlib.ExitStack() as stack:
        for name in ("find-links", "cert", "index-url"):
            words = (
                os.environ.get(f"PIP_{name.upper().replace('-', '_')}") or settings.get(f"global.{name}", "")
            ).split()
            found = [stack.enter_context(served(word)) if os.path.isdir(word) else word for word in words]
            lines += [f"{name} = {' '.join(found)}"] * bool(found)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = Path(folder) / "pip.conf"
        config.write_text("\n".join([*lines, ""]))
        yield config


CANARY = "a-secret-of-the-builder-8b1f"  # stands in pip.conf, which may have one; it must be in no layer


@contextlib.contextmanager
def served(folder: str) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def _answers(program: str, environment: dict[str, str]) -> bool:
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        words = [program, "info", "--format", "{{.ServerVersion}}"]
        done = subprocess.run(
            words, env=os.environ | environment, capture_output=True, text=True, timeout=20, check=False
        )
        return done.returncode == 0 and bool(done.stdout.strip())
    return False


def missing() -> str:
    """Why there can be no engine here, or ''."""
    if _answers("docker", {}):
        return ""
    if os.geteuid() != 0:
        return "no Docker engine answers, and to start one takes root"
    return "" if shutil.which("apt-get") else "no Docker engine answers, and to install one takes apt-get"


# One line for the whole folder, where a skip would be one for every test.
MISSING = missing()
collect_ignore_glob = ["test_*.py"] if MISSING and os.environ.get("CI") != "true" else []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if collect_ignore_glob:
        terminalreporter.write_line(f"SKIPPED tests/docker: {MISSING}")


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """An engine; one of our own goes at the end, unless it was there before."""
    assert not MISSING, MISSING
    if _answers("docker", {}):
        yield Docker("docker", {"DOCKER": "docker"})
        return
    was_up = engine("status") == "up\n"
    address = engine("up").strip()
    ours = Docker("/usr/bin/docker", {"DOCKER": "/usr/bin/docker", "DOCKER_HOST": address}, is_ours=True)
    if not ours("images", "--quiet", BASE).strip():
        engine("base", BASE)
    yield ours
    ours("image", "prune", "--force")  # what the images of this tree have replaced
    if not was_up:
        engine("down")


def engine(*words: str) -> str:
    done = subprocess.run([ENGINE, *words], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def image(docker: Docker) -> str:
    """The image of this tree."""
    docker.build()
    return IMAGE


@pytest.fixture(scope="session")
def devel(docker: Docker, image: str) -> str:
    docker.build(target="devel", image=f"{IMAGE}-devel")
    return f"{IMAGE}-devel"


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A folder with a job, `held.yaml`, that takes as long as `schedule.args.pause_s` says, and no `jobs/` of ours."""
    (workplace.folder / "jobs").unlink()
    workplace.write("held.py", HELD)
    lines = [line for line in DIGITS.splitlines() if not line.startswith("schedule:")]
    workplace.write("held.yaml", "\n".join([*lines, "schedule: {name: held:schedule}", ""]))
    return workplace
