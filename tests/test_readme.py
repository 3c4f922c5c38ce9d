"""The README is run: its files are written, its commands typed in their order, its paths looked up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workplace

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line[2:] for kind, text in BLOCKS if kind == "console" for line in text.splitlines() if line.startswith("$ ")
]
TARGETS = [command.removeprefix("make ") for command in COMMANDS if command.startswith("make ")]


def test_the_commands_work_as_typed(workplace: Workplace) -> None:
    mine, plain = [text for kind, text in BLOCKS if kind == "python"]
    (waves,) = [text for kind, text in BLOCKS if kind == "yaml" and "mine:" in text]
    workplace.write("mine.py", mine)
    workplace.write("waves.yaml", waves)
    workplace.write("plain.py", plain)
    elsewhere = {"make test", "make tour"}  # the one runs this, the other is run in tests/dist/test_tour.py
    typed = [_trained_here(command) for command in COMMANDS if command not in elsewhere]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = ""
    for words in [*typed, [sys.executable, "plain.py"]]:
        done = subprocess.run(
            words, cwd=workplace.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    promised = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines() if line[0] not in "$."]
    for line in promised:
        assert re.search(_pattern(line), said), f"the README promises {line!r}"


def _trained_here(command: str) -> list[str]:
    """The words of a command as this test can run it: with this Python, and `make train-local` as what it does."""
    if command == "make train-local":
        shown = subprocess.run(
            ["make", "--no-print-directory", "-n", "train-local"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        command = shown.stdout.splitlines()[-1].removeprefix(".venv/bin/")
    program, *words = command.split()
    module = {"toolkit": "toolkit", "torchrun": "torch.distributed.run"}[program]
    return [sys.executable, "-m", module, *words]


def _pattern(line: str) -> str:
    """A line of output with its measured figures left open."""
    return re.sub(r"0\\\.\d{4}", r"\\d\\.\\d{4}", re.escape(line)).replace(r"\.\.\.", ".*")


@pytest.mark.parametrize("target", [*TARGETS, "check", "bench"])
def test_the_targets_it_names_exist(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, timeout=60, check=True)
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert f"make {target}" in listed.stdout


def test_the_paths_it_names_exist() -> None:
    named = re.findall(r"`((?:toolkit|jobs|tests|docker|slurm)/[\w./-]*)`", README)
    assert len(named) > 10
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_tree_is_the_tree() -> None:
    tree = README.partition("```\ntoolkit/\n")[2].partition("```")[0]
    shown = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "toolkit").iterdir()}
    assert shown == {name for name in there if not name.startswith("_")} - {"errors.py", "secret.py", "signals.py"}


def test_the_job_it_shows_is_the_job() -> None:
    (shown,) = [text for kind, text in BLOCKS if kind == "yaml" and "digits" in text]
    assert shown in (ROOT / "jobs/digits_mlp.yaml").read_text()


def test_it_has_no_path_of_one_machine() -> None:
    assert not re.search(r"(?<![\w.~])/(?:home|root|tmp|work)/", README)
    assert not Path(README.split()[0]).is_absolute()
