"""The README is run: its files are written, its commands typed in their order, its paths looked up."""

import os
import re
import signal
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
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
PLAIN = [text for text in PYTHON if "from toolkit import" in text]  # loops of somebody's own
TARGETS = [command.removeprefix("make ") for command in COMMANDS if command.startswith("make ")]


@pytest.mark.timeout(1500)  # some 24 commands
def test_the_commands_work_as_typed(workplace: Workplace) -> None:
    (mine,) = [text for text in PYTHON if text not in PLAIN]
    (waves,) = [text for kind, text in BLOCKS if kind == "yaml" and "mine:" in text]
    workplace.write("mine.py", mine)
    workplace.write("waves.yaml", waves)
    elsewhere = {"make test", "make tour"}  # the one runs this, the other is run in tests/dist/test_tour.py
    typed = [_trained_here(command) for command in COMMANDS if command not in elsewhere]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = ""
    for words in typed:
        done = subprocess.run(
            words, cwd=workplace.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    promised = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines() if line[0] not in "$."]
    for line in promised:
        assert re.search(_pattern(line), said), f"the README promises {line!r}"


@pytest.mark.parametrize("part", ["ElasticDistributedSampler", "Checkpointer"])
def test_a_part_serves_a_plain_loop_in_at_most_15_lines(workplace: Workplace, part: str) -> None:
    (plain,) = [text for text in PLAIN if f"import {part}\n" in text]
    assert len([line for line in plain.splitlines() if line.strip()]) <= 15
    assert _run_here(workplace, plain).returncode == 0


def test_the_loop_that_saves_goes_on_after_a_kill(workplace: Workplace) -> None:
    (plain,) = [text for text in PLAIN if "import Checkpointer\n" in text]
    telling = plain.replace("    state.step += 1\n", "    state.step += 1\n    print(state.step, flush=True)\n")
    killed = "    if state.step == 70: checkpointer.wait(); __import__('os').kill(0, 9)\n"
    before = _run_here(workplace, telling.replace("    if state.step %", f"{killed}    if state.step %"))
    after = _run_here(workplace, telling)
    assert (before.returncode, after.returncode) == (-signal.SIGKILL, 0)
    assert [list(map(int, done.stdout.split())) for done in (before, after)] == [[*range(1, 71)], [*range(61, 101)]]


def _run_here(workplace: Workplace, code: str) -> "subprocess.CompletedProcess[str]":
    """The end of a program of somebody's own, which is all there is to its process group."""
    return subprocess.run(
        [sys.executable, workplace.write("plain.py", code)],
        cwd=workplace.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        start_new_session=True,
    )


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
