"""`toolkit.launch` in a process of its own, as a notebook's is: it is interrupted and killed like one."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

# What a cell says; the run that it returns is shown at the end.
CELL = """
import sys
import toolkit
assert "torch" not in sys.modules
changes = ["train.max_steps={steps}", "schedule.name=held:cosine", "run.dir=runs/x"]
run = toolkit.launch("digits.yaml", *changes, processes={processes})
print("RETURNED", type(run).__name__, run.status()["state"], run.status()["step"], len(run.metrics.read()))
"""


def cell(stage: Any, steps: int, processes: int = 2, **environment: str) -> "subprocess.Popen[str]":
    """A notebook's process with that cell, in a process group of its own, as Jupyter starts kernels."""
    stage.place.write("cell.py", CELL.format(steps=steps, processes=processes))
    return subprocess.Popen(
        [sys.executable, "cell.py"],
        cwd=stage.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(stage.tmp)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,  # noqa: PLW1509 - of one thread, it cannot deadlock
    )


def _heed_interrupts() -> None:
    """Whoever runs these tests in the background has the shell ignore them, and children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def held(stage: Any, process: "subprocess.Popen[str]", processes: int) -> None:
    """Wait until every rank waits before step 15."""
    waits = [stage.folder / f"held-15-{rank}" for rank in range(processes)]
    stage.wait_for(lambda: all(path.exists() for path in waits), "step 15 of every rank", process)


@pytest.fixture
def hold(stage: Any) -> None:
    for rank in range(2):
        (stage.folder / f"hold-15-{rank}").touch()


def test_it_trains_shows_and_returns_the_run(stage: Any) -> None:
    process = cell(stage, steps=20, RANK="3")  # left there by somebody who has tried to do without
    out, err = stage.end(process, 0)
    assert "2 ranks on cpu" in out
    assert out.splitlines()[-1].startswith("RETURNED Run completed 20 ")
    assert err == ""


@pytest.mark.usefixtures("hold")
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_stops_it_with_everything_saved(stage: Any, processes: int) -> None:
    process = cell(stage, 300, processes)
    held(stage, process, processes)
    os.killpg(process.pid, signal.SIGINT)  # as Jupyter does
    stage.wait_until_told(range(processes), process)
    stage.release()
    out, _ = stage.end(process, 0)
    assert "the same command goes on" in out
    assert "RETURNED Run preempted" in out


@pytest.mark.usefixtures("hold")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_notebook_leaves_a_run_that_is_saved_and_nothing_else(stage: Any, processes: int) -> None:
    process = cell(stage, 300, processes)
    held(stage, process, processes)
    process.kill()
    stage.wait_until_told(range(processes))
    stage.release()
    process.communicate(timeout=180)
    stage.wait_for(lambda: not stage.alive(), "end of all ranks")
    status = stage.place.status("runs/x")
    assert (status["state"], status["reason"]) == ("preempted", "stopped by SIGTERM")
    assert (stage.folder / f"runs/x/checkpoints/step-{status['step']:08d}/manifest.json").exists()


def test_a_wrong_job_is_an_exception_with_its_words(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import toolkit

    monkeypatch.chdir(stage.folder)
    with pytest.raises(toolkit.JobError, match="hiden"):
        toolkit.launch("digits.yaml", "model.args.hiden=[8]", processes=2)
    assert not (stage.folder / "runs").exists()


def test_a_failed_run_is_an_exception_with_its_words(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import toolkit

    monkeypatch.chdir(stage.folder)
    job = toolkit.load_job("digits.yaml", ["run.dir=runs/x", "optimizer.args.lr=1e20", "train.max_steps=5"], {})
    with pytest.raises(toolkit.RunError, match="the loss is nan"):
        toolkit.launch(job, processes=1)
    assert stage.place.status("runs/x")["state"] == "failed"
