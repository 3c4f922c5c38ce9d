"""The tour: each lesson runs, fails if its claim is false, and points on; lesson 8 ends with the weights of lesson 7.

The notebook is executed by a kernel, as Jupyter would.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, tensors_of

TOUR = ROOT / "jobs/tour"
LESSONS = sorted(path.name for path in TOUR.glob("lesson_*.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# One falsehood for each lesson: what stands there, and what is put in its place.
FALSE = {
    "lesson_1_tensors.py": ("table.transpose(0, 1)", "table.reshape(3, 2)"),
    "lesson_2_autograd.py": ("loss.backward()", "(1.01 * loss).backward()"),
    "lesson_3_network.py": ("other.load_state_dict(torch.load(path, weights_only=True))", "torch.load(path)"),
    "lesson_4_data.py": ("num_workers=2", "num_workers=0"),
    "lesson_5_loop.py": ("        optimizer.step()", "        pass"),
    "lesson_6_device.py": ('numbers.to(gpu or "meta")', "numbers.clone()"),
    "lesson_7_processes.py": ("DistributedSampler(digits)", "DistributedSampler(digits, 2, 0)"),
    "lesson_8_toolkit.py": (".items():", ".items():\n    weight.flatten()[-1].nextafter_(torch.tensor(9.0))"),
}


def python(words: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def cpu_s() -> float:
    """Seconds of a CPU that all processes took which have ended: who else is on this machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Tour:
    """A copy of `jobs/` in which each lesson is run at most once, the seventh before the eighth."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        self._said: dict[str, str] = {}
        before_s = cpu_s()
        python(["-c", "import torch"], folder)
        self.most_s = max(30.0, 25 * (cpu_s() - before_s))  # 30 s where torch is imported in 1.2 s; else as much slower

    def said(self, lesson: str) -> str:
        if lesson not in self._said:
            if lesson == LESSONS[7]:
                self.said(LESSONS[6])
            before_s = cpu_s()
            done = python([f"jobs/tour/{lesson}"], self.folder)
            assert done.returncode == 0, done.stdout + done.stderr
            assert cpu_s() - before_s < self.most_s
            self._said[lesson] = done.stdout
        return self._said[lesson]


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    return Tour(tmp_path_factory.mktemp("tour"))


def test_there_are_eight_lessons_and_make_runs_them_in_order() -> None:
    assert [name[:9] for name in LESSONS] == [f"lesson_{number}_" for number in range(1, 9)]
    recipe = re.search(r"^tour:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    named = recipe[1].replace("$(BIN)/python", "echo").replace("$$", "$").replace("\t@", "")
    shown = subprocess.run(["sh", "-c", named], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.split() == [f"jobs/tour/{name}" for name in LESSONS]


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_runs_and_points_on(lesson: str, tour: Tour) -> None:
    *_, same, following = tour.said(lesson).splitlines()
    line = same.removeprefix("With toolkit: ")
    assert line != same
    assert line.startswith("toolkit train ") or line in [
        code.strip() for code in (TOUR / lesson).read_text().split("\n")
    ]
    assert (ROOT / following.removeprefix("Read next: ")).is_relative_to(ROOT / "toolkit")
    assert (ROOT / following.removeprefix("Read next: ")).is_file()


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_says_its_number_and_has_at_most_80_lines(lesson: str) -> None:
    lines = (TOUR / lesson).read_text().splitlines()
    assert len(lines) <= 80
    assert lines[0].startswith(f'"""Lesson {lesson[7]}: ')


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_fails_if_its_claim_is_false(lesson: str, tour: Tour, tmp_path: Path) -> None:
    text, (true, false) = (TOUR / lesson).read_text(), FALSE[lesson]
    assert true in text
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "jobs/tour" / lesson).write_text(text.replace(true, false))
    if lesson == LESSONS[7]:
        tour.said(lesson)
        shutil.copytree(tour.folder / "runs", tmp_path / "runs")
    done = python([f"jobs/tour/{lesson}"], tmp_path)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    assert lesson != LESSONS[7] or "This run is complete" in done.stdout  # what a second start of the lesson says


def test_the_loop_by_hand_and_the_job_end_with_the_same_weights(tour: Tour) -> None:
    assert "completed at step 225" in tour.said(LESSONS[7])
    by_hand = torch.load(tour.folder / "runs/lesson_7.pt", weights_only=True)
    by_toolkit = tensors_of(str(tour.folder / "runs/lesson_8"), 225)
    assert len(by_hand) == 4
    for name, weight in by_hand.items():
        assert torch.equal(weight, by_toolkit[f"model/{name}"]), name


def test_the_eighth_lesson_says_that_it_follows_the_seventh(tmp_path: Path) -> None:
    done = python([str(TOUR / LESSONS[7])], tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("run lesson 7 first")


@pytest.mark.parametrize("lesson", [LESSONS[4]])
def test_the_command_it_ends_with_works(lesson: str, tour: Tour) -> None:
    """Of the fifth lesson; the eighth runs its own, which is the seventh's too."""
    command = tour.said(lesson).splitlines()[-2].removeprefix("With toolkit: toolkit ")
    done = python(["-m", "toolkit", *command.split()], tour.folder)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"test/accuracy (\S+)", done.stdout)[-1]) > 0.9


EXECUTED = """
import nbclient, nbformat
book = nbformat.read("jobs/tour/notebook.ipynb", as_version=4)
nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": "jobs/tour"}}).execute()
nbformat.write(book, "executed.ipynb")
"""


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_trains_plots_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(tmp_path))  # or IPython and matplotlib would write into the user's
    done = python(["-c", EXECUTED], tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in cells(tmp_path / "executed.ipynb") for output in cell["outputs"]]
    said = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert "2 ranks on cpu" in said
    assert "resuming at step 324 in" in said
    assert said.splitlines()[-1] == "from step 324 to step 647"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    (found,) = (tmp_path / "runs").glob("notebook-*/status.json")
    status = json.loads(found.read_text())
    assert (status["state"], status["step"]) == ("completed", 647)


def test_the_notebook_is_kept_without_outputs() -> None:
    kept = cells(TOUR / "notebook.ipynb")
    assert len(kept) > 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in kept)
