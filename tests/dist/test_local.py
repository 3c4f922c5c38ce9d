"""`toolkit submit --executor local`: ranks of this machine, in the background, that need no terminal and no Slurm."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT
from tests.dist.conftest import Stage
from toolkit.process import is_gone

LONG = ("train.max_steps=1000000", "log.every_steps=1000", "launch.processes=2")
SUBMIT = ("submit", "digits.yaml", "--executor", "local")


def submitted(stage: Stage) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((stage.folder / "runs/digits/submitted.json").read_text())
    return record


def test_it_trains_in_the_background_whatever_becomes_of_the_terminal(stage: Stage) -> None:
    terminal = subprocess.Popen(
        [sys.executable, "-m", "toolkit", *SUBMIT, *LONG, "--wait"], cwd=stage.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(stage.tmp)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    status = stage.folder / "runs/digits/status.json"
    running = lambda: '"running"' in status.read_text() and json.loads(status.read_text()).get("step")  # noqa: E731
    stage.wait_for(lambda: status.exists() and running(), "the first steps", terminal)
    os.killpg(terminal.pid, signal.SIGINT)  # Ctrl-C
    out, _ = terminal.communicate(timeout=180)
    assert terminal.returncode == 130, out
    os.killpg(terminal.pid, signal.SIGHUP)  # the terminal is closed
    before = json.loads(status.read_text())["step"]
    stage.wait_for(lambda: json.loads(status.read_text())["step"] > before, "further steps")
    assert "runs/digits: running at step" in stage.run("status", "runs/digits")
    assert "2 ranks on cpu" in stage.run("logs", "runs/digits")
    message = stage.run(*SUBMIT, *LONG, status=2)
    assert f"running on this machine, in the background (pid {submitted(stage)['pid']})" in message
    stage.run("cancel", "runs/digits")
    assert json.loads(status.read_text())["state"] == "cancelled"
    pid = submitted(stage)["pid"]
    stage.wait_for(lambda: is_gone(pid), "its end")


def test_who_waits_sees_it_complete_from_the_code_as_it_was(stage: Stage) -> None:
    stage.place.write("site.yaml", "setup: ['# a comment', 'export SET_UP=yes  # and another']\nenv: {A: \"it's\"}\n")
    named = (*SUBMIT, 'run.dir="runs/it\'s $(touch pwned); a run"')
    said = stage.run(*named, "--cluster", "site.yaml", "--gpus-per-node", "2", "--wait")
    assert "2 ranks on cpu" in said
    assert "digits: completed at step 40 of 40" in said
    assert "This run is complete" in stage.run(*named)
    assert not list(stage.folder.rglob("pwned"))


def test_a_run_of_this_terminal_is_not_submitted_too(stage: Stage) -> None:
    process = stage.hold("train", "digits.yaml", "schedule.name=held:cosine", before=3, ranks=[0])
    message = stage.run(*SUBMIT, "schedule.name=held:cosine", status=2)
    assert f"is already running on host {os.uname().nodename} (pid {process.pid})" in message
    stage.release()
    stage.end(process, 0)


def test_the_function_submits_as_the_command_does_and_returns_the_run(stage: Stage) -> None:
    stage.place.write(
        "own.py",
        "import toolkit\n"
        "job = toolkit.load_job('digits.yaml', ['train.max_steps=7'])\n"
        "(run,) = toolkit.submit(job, 'run.dir=runs/x', executor='local', wait=True)\n"
        "print('RETURNED', run.url.endswith('/runs/x'), run.status()['state'], run.metrics.read()[-1]['step'])\n"
        "(again,) = toolkit.submit(job, 'run.dir=runs/x', executor='local')\n"
        "print('AGAIN', again.status()['step'])\n"
        "try:\n    toolkit.submit('digits.yaml', 'model=mpl', executor='local')\n"
        "except toolkit.JobError as error:\n    print('REFUSED', error)\n",
    )
    done = subprocess.run(
        [sys.executable, "own.py"], cwd=stage.folder, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(stage.tmp)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RETURNED True completed 7" in done.stdout
    assert "AGAIN 7" in done.stdout
    assert "REFUSED model 'mpl' is unknown; did you mean 'mlp'" in done.stdout
    assert not (stage.folder / "runs/digits").exists()
