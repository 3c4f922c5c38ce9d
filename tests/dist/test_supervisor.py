"""Whatever kills a run, or stops it: all ranks end, the cause is said once, and the same command goes on."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

STEPS = 300
DIGITS = [
    "train", "digits.yaml", f"train.max_steps={STEPS}", "schedule.name=held:cosine", "run.dir=runs/x",
    "eval.every_epochs=1000", "launch.max_restarts=0",
]  # fmt: skip
SOON_S = 15

BROKEN = """
import os
from pathlib import Path

from torch.utils.data import Dataset

from toolkit.datasets.digits import Digits


class Broken(Dataset):
    num_classes, input_shape = Digits.num_classes, Digits.input_shape

    def __init__(self, bad: int):
        self.digits, self.bad = Digits(), bad

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError("torn in two")
        return self.digits[index]
"""


def everyone(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("killed", "others_wait"), [(0, True), (1, False)], ids=["others-in-python", "others-in-a-reduction"]
)
def test_a_killed_rank_ends_all_and_is_named(stage: Any, killed: int, others_wait: bool) -> None:
    ranks = [0, 1] if others_wait else [killed]
    process = stage.hold(*DIGITS, "--processes=2", "data.workers=2", before=15, ranks=ranks)
    left = everyone(process)
    assert len(left) >= 1 + 2 + 4, "torchrun, ranks and their loader workers"
    psutil.Process(stage.notes()[killed]["pid"]).kill()

    _, err = stage.end(process, 1, timeout_s=SOON_S)
    assert f"rank {killed} (pid" in err
    assert "killed by SIGKILL" in err
    assert "Traceback" not in err
    status = stage.place.status("runs/x")
    assert status["state"] == "failed"
    assert status["exit"] == 1
    assert f"rank {killed}" in status["reason"]
    assert not [one for one in left if one.is_running()]
    assert not stage.alive()
    assert not [*stage.tmp.glob("toolkit-*"), *stage.tmp.glob("torchelastic_*")], "folders of the attempt"


def test_an_exception_on_one_rank_is_said_once_with_its_rank(stage: Any) -> None:
    from toolkit.datasets.sampler import ElasticDistributedSampler

    stage.place.write("broken.py", BROKEN)
    share = ElasticDistributedSampler(range(1438), 2, 1, seed=0, global_batch_size=32)
    bad = int(share.share(7)[1][3])  # first wanted in the eighth step, by rank 1
    err = stage.run(
        *DIGITS, "--processes=2", "data.val=null", "data.train.name=broken:Broken",
        f"data.train.args.bad={bad}", status=1,
    )  # fmt: skip
    message = err[err.index("rank ") :]
    assert message.startswith("rank 1: ")
    assert err.count("torn in two") == 1
    assert f"sample {bad}" in message
    assert "Traceback" not in err
    status = stage.place.status("runs/x")
    assert (status["state"], status["exit"]) == ("failed", 1)
    assert "torn in two" in status["reason"]


BUSY = """
import os
import time
from pathlib import Path

from toolkit.datasets import digits


class Busy(digits.Digits):
    def __init__(self):
        Path(f"is-here-{os.environ['RANK']}").touch()
        if os.environ["RANK"] == "0":
            time.sleep(300)
        raise ValueError("no such disk")
"""


def test_what_a_rank_is_refused_for_is_said_soon_though_another_is_busy(stage: Any) -> None:
    stage.place.write("busy.py", BUSY)
    process = stage.start(*DIGITS, "--processes=2", "data.val=null", "data.train.name=busy:Busy")
    stage.wait_for(lambda: len([*stage.folder.glob("is-here-*")]) == 2, "both ranks", process)
    _, err = stage.end(process, 2, timeout_s=25)
    assert "no such disk" in err
    assert not (stage.folder / "runs").exists()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_is_saved_and_the_same_command_goes_on(
    stage: Any, equal: Callable[..., bool], processes: int, number: signal.Signals
) -> None:
    words = [*DIGITS, f"--processes={processes}"]
    process = stage.hold(*words, before=15, ranks=range(processes))
    process.send_signal(number)
    stage.wait_until_told(range(processes), process)
    stage.release()
    out, err = stage.end(process, 75)

    assert "the same command goes on" in out
    assert err == ""
    status = stage.place.status("runs/x")
    assert (status["state"], status["exit"]) == ("preempted", 75)
    assert status["reason"] == f"stopped by {number.name}"
    assert 15 < status["step"] < STEPS
    saved = stage.folder / "runs/x/checkpoints" / f"step-{status['step']:08d}" / "manifest.json"
    assert json.loads(saved.read_text())["manifest"]["step"] == status["step"]
    assert stage.place.metrics("runs/x")[-1]["step"] == status["step"]

    assert f"resuming at step {status['step']}" in stage.run(*words)
    assert stage.place.status("runs/x")["state"] == "completed"
    stage.run(*words, "run.dir=runs/undisturbed")
    assert equal(stage.place.tensors("runs/x", STEPS), stage.place.tensors("runs/undisturbed", STEPS))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_while_torch_is_imported_is_a_stop(stage: Any, processes: int) -> None:
    process = stage.start(*DIGITS, f"--processes={processes}")
    if processes == 1:
        maps = psutil.Process(process.pid).memory_maps
        stage.wait_for(lambda: any("libtorch" in each.path for each in maps()), "import of torch", process)
    else:
        stage.wait_for(lambda: len(stage.notes()) == 2, "notes of both ranks", process)
    process.terminate()
    stage.end(process, 75)
    assert stage.place.status("runs/x")["state"] == "preempted"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_completed_run_says_so_and_changes_nothing(stage: Any, processes: int) -> None:
    words = [*DIGITS, f"--processes={processes}", "train.max_steps=12"]
    stage.run(*words)
    before = contents(stage.folder / "runs")
    assert before
    said = stage.run(*words, timeout_s=5)
    assert "completed at step 12 of 12" in said
    assert "complete: raise train.epochs" in said
    assert contents(stage.folder / "runs") == before


def test_a_completed_run_goes_on_when_its_end_is_raised(stage: Any) -> None:
    stage.run(*DIGITS, "train.max_steps=12")
    said = stage.run(*DIGITS, "train.max_steps=20")
    assert "resuming at step 12" in said
    assert "completed at step 20 of 20" in said
    said = stage.run(*DIGITS, "train.max_steps=null", "train.epochs=1")
    assert "resuming at step 20" in said
    status = stage.place.status("runs/x")
    assert (status["state"], status["step"], status["total"]) == ("completed", 41, 41)  # 1294 samples in batches of 32


@pytest.mark.parametrize("processes", [1, 2])
def test_fresh_starts_over_beside_the_old_run(stage: Any, processes: int) -> None:
    words = [*DIGITS, f"--processes={processes}", "train.max_steps=12"]
    stage.run(*words)
    before = contents(stage.folder / "runs/x")
    assert "starting in runs/x-2" in stage.run(*words, "--fresh")
    assert contents(stage.folder / "runs/x") == before
    assert stage.place.status("runs/x-2")["step"] == 12


def test_a_wrong_model_is_exit_2_with_its_message_once_and_nothing_written(stage: Any) -> None:
    message = stage.place.refused(*DIGITS, "--processes=2", "model.args.hiden=[8]", TMPDIR=str(stage.tmp))
    assert message.count("hiden") == 1
    assert "hidden" in message


def test_auto_is_one_process_without_a_gpu(stage: Any) -> None:
    process = stage.hold(*DIGITS, before=15, ranks=[0], CUDA_VISIBLE_DEVICES="")
    assert not everyone(process), "the one rank is the command itself"
    assert not stage.notes()
    stage.release()
    assert "1 rank on" in stage.end(process, 0)[0]


def test_provenance_and_logs_tell_of_every_attempt(stage: Any) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(stage.folder)]
    subprocess.run([*git, "init", "-q"], check=True, timeout=20)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True, timeout=20)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, timeout=20, capture_output=True, text=True).stdout

    words = [*DIGITS, "--processes=2"]
    stage.kill_whole(stage.hold(*words, before=15, ranks=[0, 1]))
    stage.run(*words)
    provenance = json.loads((stage.folder / "runs/x/provenance.json").read_text())
    assert provenance["job"]["train"]["max_steps"] == STEPS
    assert len(provenance["attempts"]) == 2
    for attempt in provenance["attempts"]:
        assert attempt["git_commit"] == head.strip()
        assert {"torch", "numpy", "python"} <= attempt["packages"].keys()
        assert "digits.yaml" in attempt["command"]
        assert attempt["threads"] == 1
    assert "attempt-2-rank-0.log" in [path.name for path in (stage.folder / "runs/x/logs").iterdir()]
