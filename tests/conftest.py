"""What tests share: the command as a user types it, in a folder of its own, and the weights a run ends with."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from toolkit import storage
from toolkit.checkpoint import Archive, reader
from toolkit.checkpoint.manifest import DTYPES

ROOT = Path(__file__).parent.parent

DIGITS = """
task: classification
data:
  train: {name: digits}
  val:   {fraction: 0.1}
  test:  {name: digits, args: {split: test}}
  global_batch_size: 32
model:     {name: mlp, args: {hidden: [32]}}
optimizer: {name: adamw, args: {lr: 3e-3}}
schedule:  {name: cosine, args: {warmup_steps: 5}}
train:     {max_steps: 40, clip_grad_norm: 1.0}
checkpoint: {every_steps: 10}
"""


@dataclass
class Workplace:
    """A new folder with `jobs/` in it, and the `toolkit` command run there."""

    folder: Path

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        """`toolkit WORDS` in the background, with one thread a rank so that sums are comparable."""
        return subprocess.Popen(
            [sys.executable, "-m", "toolkit", *words],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, status: int = 0, timeout_s: float = 300, **environment: str) -> str:
        """`toolkit WORDS`, asserted to end with `status`. Returns stdout and stderr together."""
        process = self.start(*words, **environment)
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == status, f"exit {process.returncode}, not {status}:\n{out}\n{err}"
        return out + err

    def refused(self, *words: str, status: int = 2, **environment: str) -> str:
        """The message of a command that must be refused with nothing written and no traceback."""
        before = set(self.folder.rglob("*"))
        message = self.run(*words, status=status, **environment)
        written = {path for path in set(self.folder.rglob("*")) - before if "__pycache__" not in path.parts}
        assert not written, f"{written} was written"
        assert "Traceback" not in message
        return message

    def metrics(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def status(self, run: str) -> dict[str, Any]:
        return json.loads((self.folder / run / "status.json").read_text())

    def tensors(self, run: str, step: int) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint: weights, averages and optimizer state."""
        return tensors_of(str(self.folder / run), step)


def tensors_of(run: str, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of a run, which may be a URL, verified."""
    archive = Archive(f"{run}/checkpoints")
    manifest = archive.verify(step)
    found = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, entry in manifest.tensors.items()}
    reader.fill(archive.folder(step), manifest, found)
    return found


@pytest.fixture(autouse=True)
def signals_are_heard() -> None:
    """What a test starts inherits these: of a shell that puts pytest into the background, whose commands ignore SIGINT,
    and of tests before it that were ranks themselves and held signals back.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    place = Workplace(tmp_path)
    place.write("digits.yaml", DIGITS)
    return place


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on disk, and one that only fsspec can reach."""
    url = str(tmp_path / "data") if request.param == "folder" else f"memory://{tmp_path.name}"
    yield url
    storage.remove(url)


@contextlib.contextmanager
def small_disk_of(size: str, folder: Path) -> Iterator[Path]:
    """A file system of its own, mounted in the folder. Skips where that cannot be had, but not on CI's machine."""
    place = folder / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        missing = f"a small disk cannot be mounted here: {done.stderr.strip()}; it takes root"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test that leaves a process running fails."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [child for child in set(psutil.Process().children(recursive=True)) - before if child.is_running()]
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def equal() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]:
    """Whether two sets of tensors are the same, bit for bit."""

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return same
