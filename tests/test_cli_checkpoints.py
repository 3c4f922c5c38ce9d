"""`toolkit checkpoints`, `fork` and `verify-resume` as a user types them."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.campaigns import starts
from tests.campaigns.starts import Forked, ForkedAgain, Started
from tests.conftest import DIGITS
from tests.dist.conftest import Stage
from toolkit.checkpoint import Archive
from toolkit.errors import JobError
from toolkit.fork import fork
from toolkit.proof import NOT_OF_THE_JOB

TRAIN = ["train", "digits.yaml", "checkpoint.keep=9"]


@pytest.fixture(scope="session", autouse=True)
def forkserver() -> None:
    starts.warm()


@pytest.fixture
def stage(workplace: Any) -> Iterator[Stage]:
    """A workplace whose commands start quickly and can be held before a step; its locks beat five times a second."""
    stage = Stage(Forked(workplace.folder, (quick_beats, ())))
    yield stage
    left = stage.alive()
    for process in left:
        process.kill()
    assert not left, f"processes left behind: {left}"


def quick_beats() -> None:
    from toolkit import lock

    lock.BEAT_S = 0.2


def checkpoints(stage: Stage, run: str, *words: str, status: int = 0) -> list[str]:
    """The lines that `toolkit checkpoints` says, with runs of spaces made one."""
    said = stage.run("checkpoints", run, *words, status=status, COLUMNS="60")
    assert "Traceback" not in said
    return [re.sub(r"\s+", " ", line).strip() for line in said.splitlines() if line.strip()]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 9] ^= 1
    path.write_bytes(content)


def data_of(stage: Stage, run: str, step: int) -> Path:
    (path,) = (stage.folder / run / "checkpoints" / f"step-{step:08d}").glob("data-*")
    return path


def steps_of(stage: Stage, run: str) -> list[int]:
    return Archive(str(stage.folder / run / "checkpoints")).steps()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ls, verify


def test_ls_shows_what_there_is_and_in_what_state(stage: Stage) -> None:
    stage.run(*TRAIN, "eval.every_epochs=null", "eval.every_steps=20", "checkpoint.best.metric=val/accuracy",
              "checkpoint.best.mode=max", "run.dir=runs/x")  # fmt: skip
    folder = stage.folder / "runs/x/checkpoints"
    data_of(stage, "runs/x", 10).unlink()
    (folder / "step-00000030/manifest.json").unlink()
    (folder / "damaged").mkdir()
    shutil.copytree(folder / "step-00000040", folder / "damaged/step-00000005")
    head, *rows = [line for line in checkpoints(stage, "runs/x") if "───" not in line]
    assert head == "step samples score size ranks attempt saved at"
    by_step = {row.split()[0]: row for row in rows}
    assert by_step.keys() == {"10", "20", "30", "40", "step-00000005"}
    score = stage.place.metrics("runs/x")[-1]["val/accuracy"]
    assert re.fullmatch(rf"40 1280 {score:.6g} 0.0 MiB 1 1 \d{{4}}-\d\d-\d\d \d\d:\d\d best", by_step["40"])
    assert by_step["20"].startswith("20 640 ")
    assert "best" not in by_step["20"]
    assert by_step["30"] == "30 not whole: being written, or left by a killed save"
    assert by_step["10"].startswith("10 damaged: ")
    assert "is missing" in by_step["10"]
    assert by_step["step-00000005"] == "step-00000005 put aside as damaged"


def test_a_run_without_checkpoints_and_a_folder_that_is_no_run_are_said_so(stage: Stage) -> None:
    stage.run(*TRAIN, "run.dir=runs/x")
    shutil.rmtree(stage.folder / "runs/x/checkpoints")
    assert checkpoints(stage, "runs/x") == ["runs/x has no checkpoints yet"]
    assert "runs/x has no checkpoints yet" in stage.place.refused("checkpoints", "runs/x", "verify")
    for action in ("ls", "verify", "prune", "export", "save-now"):
        assert "jobs is no run: it has no config.yaml" in stage.place.refused("checkpoints", "jobs", action)


def test_verify_reads_every_byte_of_all_or_of_one(stage: Stage) -> None:
    stage.run(*TRAIN, "run.dir=runs/x")
    good = checkpoints(stage, "runs/x", "verify")
    assert [line.split(",")[0] for line in good] == [f"step {step}: good" for step in (10, 20, 30, 40)]

    flip_a_byte(data_of(stage, "runs/x", 20))
    before = contents(stage.folder / "runs/x")
    lines = checkpoints(stage, "runs/x", "verify", status=1)
    assert [line.split(":")[1].strip().split(",")[0] for line in lines] == ["good", "DAMAGED", "good", "good"]
    assert data_of(stage, "runs/x", 20).name in lines[1]
    assert contents(stage.folder / "runs/x") == before, "and changes nothing"

    assert checkpoints(stage, "runs/x", "verify", "--checkpoint", "last")[0].startswith("step 40: good")
    assert checkpoints(stage, "runs/x", "verify", "--checkpoint", "20", status=1)[0].startswith("step 20: DAMAGED")
    refusal = stage.place.refused("checkpoints", "runs/x", "verify", "--checkpoint", "21")
    assert "has no checkpoint '21'; it has steps [10, 20, 30, 40]" in refusal


@pytest.mark.parametrize("name", ["manifest.json", "state-", "data-"])
def test_verify_finds_a_flipped_bit_in_any_file(stage: Stage, name: str) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/x")
    (path,) = (stage.folder / "runs/x/checkpoints/step-00000010").glob(f"{name}*")
    flip_a_byte(path)
    (line,) = checkpoints(stage, "runs/x", "verify", status=1)
    assert line.startswith("step 10: DAMAGED: ")
    assert path.name in line


def test_debug_shows_where_an_error_came_from(stage: Stage) -> None:
    said = stage.run("checkpoints", "jobs", "--debug", status=2)
    assert "Traceback" in said
    assert "JobError: jobs is no run" in said


# prune


def test_prune_removes_what_the_job_does_not_keep_and_what_kills_have_left(stage: Stage) -> None:
    stage.run(*TRAIN, "run.dir=runs/x")
    config = stage.folder / "runs/x/config.yaml"
    config.write_text(config.read_text().replace("keep: 9", "keep: 1").replace("keep_every: null", "keep_every: 20"))
    folder = stage.folder / "runs/x/checkpoints"
    (folder / "step-00000050").mkdir()
    (folder / "step-00000050/data-1.9.0.0.bin").write_bytes(b"half")
    (folder / "step-00000040/data-1.9.0.0.bin").write_bytes(b"half")
    lines = checkpoints(stage, "runs/x", "prune")
    assert lines == ["removed checkpoints: 10, 30; leftovers of killed saves: 2"]
    assert sorted(os.listdir(folder)) == ["step-00000020", "step-00000040"]
    assert len(os.listdir(folder / "step-00000040")) == 3
    assert checkpoints(stage, "runs/x", "prune") == ["removed checkpoints: none; leftovers of killed saves: 0"]


def test_prune_leaves_a_run_that_trains_alone_but_not_one_that_was_killed(stage: Stage) -> None:
    training = stage.hold(*TRAIN, "schedule.name=held:cosine", "run.dir=runs/x", before=12, ranks=[0])
    stage.wait_for(lambda: steps_of(stage, "runs/x") == [10], "checkpoint")
    half = stage.folder / "runs/x/checkpoints/step-00000011"  # as of a save that is being written
    half.mkdir()
    (half / "data-1.2.0.0.bin").write_bytes(b"half")
    (line, refusal) = checkpoints(stage, "runs/x", "prune", status=2)
    assert "watching it" in line
    assert f"(pid {training.pid}), which prunes for itself; end it first" in refusal
    assert half.exists()
    stage.kill_whole(training)
    assert checkpoints(stage, "runs/x", "prune")[-1] == "removed checkpoints: none; leftovers of killed saves: 1"
    assert not half.exists()


# export


def test_export_writes_the_model_as_one_file_that_needs_no_toolkit(stage: Stage) -> None:
    stage.run(*TRAIN, "train.ema_decay=0.9", "run.dir=runs/x")
    assert checkpoints(stage, "runs/x", "export") == ["runs/x/model.safetensors: 4 tensors of step 40"]
    assert checkpoints(stage, "runs/x", "export", "--raw", "--checkpoint", "20", "--to", "out/raw.safetensors")
    averaged, raw = (
        load_file(stage.folder / "runs/x/model.safetensors"),
        load_file(stage.folder / "out/raw.safetensors"),
    )
    last, earlier = stage.place.tensors("runs/x", 40), stage.place.tensors("runs/x", 20)
    assert same(averaged, {name[4:]: tensor for name, tensor in last.items() if name.startswith("ema/")})
    assert same(raw, {name[6:]: tensor for name, tensor in earlier.items() if name.startswith("model/")})
    with safe_open(stage.folder / "runs/x/model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "40"


def test_a_damaged_checkpoint_is_not_exported(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/x")
    flip_a_byte(data_of(stage, "runs/x", 10))
    (line,) = checkpoints(stage, "runs/x", "export", status=1)
    assert "is damaged" in line
    assert not (stage.folder / "runs/x/model.safetensors").exists()


def test_what_is_to_be_exported_must_be_there(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/x")
    refusal = stage.place.refused("checkpoints", "runs/x", "export", "--checkpoint", "best")
    assert "has no checkpoint 'best'; it has steps [10]" in refusal


# save-now

ENDLESS = [*TRAIN, "train.max_steps=100000000", "checkpoint.every_steps=null", "checkpoint.every_min=1000"]


def running(stage: Stage, *words: str) -> Started:
    process = stage.start(*words, "run.dir=runs/x")
    status = stage.folder / "runs/x/status.json"
    stage.wait_for(lambda: status.exists() and json.loads(status.read_text())["step"] > 0, "first steps", process)
    return process


def test_a_running_run_saves_when_it_is_asked_to(stage: Stage) -> None:
    training = running(stage, *ENDLESS)
    for count in (1, 2):
        (line,) = checkpoints(stage, "runs/x", "save-now", "--timeout-s", "60")
        steps = steps_of(stage, "runs/x")
        assert line == f"saved: runs/x/checkpoints/step-{steps[-1]:08d}"
        assert len(steps) == count
    assert checkpoints(stage, "runs/x", "verify")[0].startswith(f"step {steps[0]}: good")
    assert os.listdir(stage.folder / "runs/x/requests") == [], "the wish was granted"
    training.send_signal(signal.SIGTERM)
    stage.end(training, 75)
    assert len(steps_of(stage, "runs/x")) == 3, "the last at its end, and none for a wish of the past"


def test_two_ranks_save_together_when_asked(stage: Stage) -> None:
    stage.place.prepare = None  # the ranks' hearts beat as ever
    training = running(stage, *ENDLESS, "--processes=2")
    (line,) = checkpoints(stage, "runs/x", "save-now", "--timeout-s", "60")
    assert line.startswith("saved: ")
    training.send_signal(signal.SIGTERM)
    stage.end(training, 75)


def test_nothing_is_asked_of_a_run_that_has_ended_or_was_killed(stage: Stage) -> None:
    stage.run(*TRAIN, "run.dir=runs/done")
    assert "nothing trains in runs/done; its checkpoints: [10, 20, 30, 40]" in stage.place.refused(
        "checkpoints", "runs/done", "save-now"
    )
    training = running(stage, *ENDLESS)
    stage.kill_whole(training)
    (line,) = checkpoints(stage, "runs/x", "save-now", status=2)
    assert line == "nothing trains in runs/x; its checkpoints: []"
    assert os.listdir(stage.folder / "runs/x/requests") == []


# fork


def test_a_fork_goes_on_as_the_run_itself_would_have(stage: Stage) -> None:
    stage.run(*TRAIN, "run.dir=runs/x")
    said = stage.run("fork", "runs/x", "--at", "20")
    assert said.split("\n")[:3] == [
        "runs/x-fork begins at step 20 of runs/x; changed:", "  nothing", "toolkit train runs/x-fork/config.yaml"
    ]  # fmt: skip
    assert steps_of(stage, "runs/x-fork") == [20]
    assert checkpoints(stage, "runs/x-fork", "verify")[0].startswith("step 20: good")
    assert same(stage.place.tensors("runs/x-fork", 20), stage.place.tensors("runs/x", 20))
    assert "resuming at step 20" in stage.run("train", "runs/x-fork/config.yaml")
    assert same(stage.place.tensors("runs/x-fork", 40), stage.place.tensors("runs/x", 40))
    one, other = (
        [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in stage.place.metrics(run)]
        for run in ("runs/x", "runs/x-fork")
    )
    assert one == other


def test_a_fork_has_a_changed_job_and_its_own_directory(stage: Stage) -> None:
    stage.run(*TRAIN, "run.dir=runs/x", "log.every_steps=5")
    before = contents(stage.folder / "runs/x")
    said = stage.run("fork", "runs/x", "optimizer.args.lr=0.1", "train.max_steps=60", "run.seed=5", "run.dir=runs/y",
                     "--at", "best", status=2)  # fmt: skip
    assert "has no checkpoint 'best'; it has steps [10, 20, 30, 40]" in said
    assert not (stage.folder / "runs/y").exists()
    said = stage.run("fork", "runs/x", "optimizer.args.lr=0.1", "train.max_steps=60", "run.seed=5", "run.dir=runs/y",
                     "--at", "30")  # fmt: skip
    assert "  optimizer.args.lr: 0.003 -> 0.1\n" in said
    assert "  run.seed: 0 -> 5\n" in said
    assert [line["step"] for line in stage.place.metrics("runs/y")] == [5, 10, 15, 20, 25, 30]
    provenance = json.loads((stage.folder / "runs/y/provenance.json").read_text())
    assert provenance["forked_from"] == {"run": "runs/x", "step": 30}
    assert "resuming at step 30" in stage.run("train", "runs/y/config.yaml")
    assert stage.place.status("runs/y")["step"] == 60
    assert stage.place.metrics("runs/y")[7]["train/learning_rate"] > 0.003
    assert contents(stage.folder / "runs/x") == before, "and the old run is as it was"


def test_each_fork_has_a_directory_of_its_own_and_none_is_written_over(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/x")
    for name in ("x-fork", "x-fork-2"):
        assert stage.run("fork", "runs/x").startswith(f"runs/{name} begins at step 10")
    assert "run.dir runs/x-fork is not empty" in stage.place.refused("fork", "runs/x", "run.dir=runs/x-fork")


@pytest.mark.parametrize(
    "change", ["model.args.hidden=[16]", "train.freeze=['layers.1.*']", "train.ema_decay=0.9", "optimizer.name=adam",
               "train.precision=bf16"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_the_changed_job_is_not_forked(stage: Stage, change: str) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/x")
    refusal = stage.place.refused("fork", "runs/x", change)
    assert f"  {change.partition('=')[0]}: " in refusal
    assert "run.init_from=runs/x" in refusal


def test_a_damaged_checkpoint_is_not_forked(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/x")
    flip_a_byte(data_of(stage, "runs/x", 10))
    assert "is damaged" in stage.place.refused("fork", "runs/x", status=1)
    assert "jobs is no run" in stage.place.refused("fork", "jobs")


def test_what_is_no_run_that_has_trained_is_not_forked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(DIGITS)
    with pytest.raises(JobError, match="has never been started"):
        fork(str(tmp_path), "last", [], {})
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(JobError, match=r"config\.yaml is damaged"):
        fork(str(tmp_path), "last", [], {})


def test_a_fork_keeps_secrets_as_they_were_written(stage: Stage) -> None:
    stage.place.write("secret.py", KEYED)
    words = ["train", "digits.yaml", "data.train={name: secret:Data, args: {key: '${env:KEY}'}}", "train.max_steps=10"]
    secrets = {"KEY": "hunter2", "PLACE": "runs/x"}
    stage.run(*words, "run.dir=${env:PLACE}", **secrets)
    stage.run("fork", "runs/x", **secrets)
    assert "dir: ${env:PLACE}-fork\n" in (stage.folder / "runs/x-fork/config.yaml").read_text()
    assert "resuming at step 10" in stage.run("train", "runs/x-fork/config.yaml", "train.max_steps=20", **secrets)
    assert not [path for path, content in contents(stage.folder / "runs").items() if b"hunter2" in content]


KEYED = """
from toolkit.datasets.digits import Digits

class Data(Digits):
    def __init__(self, key: str):
        super().__init__()
"""

# verify-resume

PROVE = [
    "verify-resume", "jobs/digits_cnn.yaml", "train.epochs=null", "train.max_steps=24", "checkpoint.every_steps=5",
    "log.every_steps=3", "model.args.width=4", "eval.every_epochs=null", "eval.every_steps=10",
]  # fmt: skip

FORGETFUL = """
import torch
from toolkit.models.cnn import Cnn

class Forgetful(Cnn):
    calls = 0  # which no checkpoint knows of

    def forward(self, inputs):
        self.calls += self.training
        return super().forward(inputs) * (1 + self.calls / 100)
"""


def test_verify_resume_proves_that_kills_change_nothing(stage: Stage) -> None:
    said = stage.run(*PROVE, "--kills=1", timeout_s=600, COLUMNS="200")
    rows = [re.sub(r"[│┃\s]+", " ", line).strip() for line in said.splitlines() if "│" in line]
    assert len(rows) == 2
    assert re.fullmatch(r"killed, 1 rank 1 0 equal equal, bit for bit equal", rows[0])
    weights = r"(equal, bit for bit|differ by .*e-\d+ of their norm)"
    assert re.fullmatch(rf"killed, 1 and 2 ranks 1 0 equal {weights} (equal|of the same steps)", rows[1])
    assert "nothing differs that must not" in said
    assert not (stage.folder / "runs").exists(), "and leaves nothing"


def start_by_forking() -> None:
    from toolkit import proof

    proof.subprocess = SimpleNamespace(Popen=ForkedAgain, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)


def test_verify_resume_finds_a_model_that_does_not_resume(stage: Stage) -> None:
    stage.place.write("mine.py", FORGETFUL)
    stage.place.prepare = (start_by_forking, ())
    said = stage.run(*PROVE, "model.name=mine:Forgetful", "--other=1", "--kills=2", "--in", "kept", status=1,
                     timeout_s=600, COLUMNS="200")  # fmt: skip
    rows = [re.sub(r"[│┃\s]+", " ", line).strip() for line in said.splitlines() if "│" in line]
    assert re.fullmatch(r"killed, 1 rank 2 [01] equal differ by .* of their norm of the same steps", rows[0])
    assert "NOT EQUAL" in said
    assert sorted(os.listdir(stage.folder / "kept")) == ["killed-other", "killed-same", "undisturbed"]


def test_a_job_that_cannot_be_built_is_wrong_usage_of_verify_resume_too(stage: Stage) -> None:
    assert "model 'nope' is unknown" in stage.place.refused("verify-resume", "digits.yaml", "model.name=nope")
