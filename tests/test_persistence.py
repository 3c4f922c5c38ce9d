"""How a run lasts, through the real command: one writer, one job, where it begins, and what becomes of failed saves."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.campaigns import starts
from tests.campaigns.starts import Forked
from tests.conftest import small_disk_of
from tests.dist.conftest import Stage, staged
from toolkit.proof import NOT_OF_THE_JOB

TRAIN = ["train", "digits.yaml", "schedule.name=held:cosine", "log.every_steps=1"]


@pytest.fixture(scope="session", autouse=True)
def forkserver() -> None:
    starts.warm()


@pytest.fixture
def stage(workplace: Any) -> Iterator[Stage]:
    """A workplace whose commands start quickly and can be held before a step."""
    with staged(Forked(workplace.folder)) as stage:
        yield stage


def saved(stage: Stage, run: str) -> list[int]:
    """The steps of all checkpoints that have a manifest."""
    return sorted(int(path.parent.name[5:]) for path in (stage.folder / run).glob("checkpoints/*/manifest.json"))


def lines(stage: Stage, run: str) -> list[dict[str, Any]]:
    """The run's metrics as far as they are a function of the job."""
    found = stage.place.metrics(run)
    return [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in found]


def contents(folder: Path, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Of every file that has none of these in its path: such as come and go while one looks."""
    paths = [path for path in folder.rglob("*") if not any(part in str(path) for part in without)]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# One writer.


def test_a_second_start_is_refused_with_host_pid_and_age_and_writes_nothing(stage: Stage) -> None:
    words = [*TRAIN, "run.dir=runs/x"]
    first = stage.hold(*words, before=12, ranks=[0])
    stage.wait_for(lambda: saved(stage, "runs/x") == [10], "checkpoint")
    changing = ("/lock/", "/status.json", "/.tmp-")

    def steady() -> dict[str, bytes]:
        return contents(stage.folder / "runs", without=changing)

    before, started_s = steady(), time.monotonic()
    message = stage.run(*words, status=2)
    assert time.monotonic() - started_s < 15
    host = os.uname().nodename
    assert f"runs/x is held by attempt 1 on host {host} (pid {first.pid}), heartbeat " in message
    assert "s ago" in message
    assert "--fresh" in message
    assert "Traceback" not in message
    assert steady() == before
    assert os.listdir(stage.folder / "runs") == ["x"]
    stage.release()
    stage.end(first, 0)


def hold_commit(after_check: bool) -> None:
    """The first commit waits for the file `go`: before it asks for the lock, or after."""
    from toolkit.checkpoint import writer
    from toolkit.checkpoint.checkpointer import Checkpointer

    owner, name = (Checkpointer, "_commit") if after_check else (writer, "check_sizes")
    original = getattr(owner, name)

    def held(*what: Any) -> None:
        setattr(owner, name, original)
        Path("committing").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        original(*what)

    setattr(owner, name, held)


@pytest.mark.parametrize("after_check", [False, True], ids=["before-the-check", "after-the-check"])
def test_a_suspended_writer_that_was_taken_over_commits_nothing_and_ends_with_words(
    stage: Stage, after_check: bool
) -> None:
    words = [*TRAIN, "checkpoint.keep=9", "run.dir=runs/x"]
    stage.run(*words[:-1], "run.dir=runs/whole")
    stage.place.prepare = (hold_commit, (after_check,))
    old = stage.start(*words, SLURM_JOB_ID="7")
    stage.wait_for((stage.folder / "committing").exists, "save", old)
    old.send_signal(signal.SIGSTOP)

    stage.place.prepare = None
    said = stage.run(*words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert "starting" in said, "no checkpoint was whole"
    before = contents(stage.folder / "runs/x")
    old.send_signal(signal.SIGCONT)
    (stage.folder / "go").touch()
    _, err = stage.end(old, 1)

    assert "attempt 2" in err
    assert "Traceback" not in err
    assert contents(stage.folder / "runs/x") == before
    assert stage.place.status("runs/x")["state"] == "completed"
    assert saved(stage, "runs/x") == [10, 20, 30, 40]
    assert os.listdir(stage.folder / "runs/x/lock") == ["attempt-0002.json"]
    assert same(stage.place.tensors("runs/x", 40), stage.place.tensors("runs/whole", 40))


def test_ranks_that_were_taken_over_leave_the_run_to_the_other(stage: Stage) -> None:
    words = [*TRAIN, "run.dir=runs/x"]
    old = stage.hold(*words, "--processes=2", before=12, ranks=[0, 1], SLURM_JOB_ID="7")
    stage.wait_for(lambda: saved(stage, "runs/x") == [10], "checkpoint")
    everyone = stage.alive()
    for process in everyone:
        process.suspend()
    stage.release()
    said = stage.run(*words, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert "resuming at step 10" in said, "on another number of ranks"
    before = contents(stage.folder / "runs/x")
    for process in everyone:
        process.resume()
    _, err = stage.end(old, 1)
    assert "attempt 2" in err
    # Its own logs may have grown, and parts of its save lie about, for its supervisor ends the ranks at once; a
    # checkpoint these are not.
    after = contents(stage.folder / "runs/x")
    own = {path for path in before.keys() | after if re.search(r"/logs/attempt-1-|-1\.2\.[^/]*$", path)}
    assert {path: after[path] for path in after.keys() - own} == {path: before[path] for path in before.keys() - own}


# One job.


def test_what_may_change_from_start_to_start_does(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=20", "run.dir=runs/x")
    said = stage.run(
        *TRAIN, "run.dir=runs/x", "train.max_steps=44", "train.epochs=1000", "log.every_steps=6", "data.workers=1",
        "train.micro_batch_size=7", "eval={every_steps: 8, batch_size: 50, precision: bf16}",
        "checkpoint={every_steps: 6, every_min: null, keep: 2, keep_every: 12, on_error: stop, "
        "best: {metric: val/accuracy, mode: max}}",
    )  # fmt: skip
    assert "resuming at step 20" in said
    assert {24, 36, 42, 44} <= set(saved(stage, "runs/x"))
    assert {line["step"] for line in stage.place.metrics("runs/x") if line["step"] > 20} == {24, 30, 32, 36, 40, 42, 44}
    assert stage.place.status("runs/x")["attempt"] == 2


def test_what_may_not_change_is_listed_old_beside_new_with_the_ways_out(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=5", "run.dir=runs/x")
    message = stage.place.refused(
        *TRAIN, "run.dir=runs/x", "model.args.hidden=[16]", "optimizer.args.lr=0.1", "run.seed=3", "train.max_steps=9"
    )
    assert "model.args.hidden: [32] -> [16]\n" in message
    assert "optimizer.args.lr: 0.003 -> 0.1\n" in message
    assert "run.seed: 0 -> 3\n" in message
    assert "max_steps" not in message
    for remedy in ("toolkit fork runs/x --at STEP", "run.init_from=runs/x", "--fresh", "old values back"):
        assert remedy in message


def test_precision_auto_that_means_something_else_here_is_listed(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=5", "run.dir=runs/x")
    path = stage.folder / "runs/x/provenance.json"
    provenance = json.loads(path.read_text())
    assert provenance["resolved"] == {"train.precision": "fp32"}
    path.write_text(json.dumps(provenance | {"resolved": {"train.precision": "bf16"}}))  # made on a machine with a GPU
    message = stage.place.refused(*TRAIN, "train.max_steps=9", "run.dir=runs/x")
    assert "train.precision: 'bf16' -> 'fp32' (what auto means on this machine)" in message


def test_a_checkpoint_of_another_job_is_refused(stage: Stage) -> None:
    for name, seed in (("x", 0), ("y", 1)):
        stage.run(*TRAIN, "train.max_steps=10", f"run.seed={seed}", f"run.dir=runs/{name}")
    shutil.rmtree(stage.folder / "runs/x/checkpoints")
    shutil.copytree(stage.folder / "runs/y/checkpoints", stage.folder / "runs/x/checkpoints")
    message = stage.run(*TRAIN, "train.max_steps=20", "run.dir=runs/x", status=1)
    assert "step-00000010 was written by another job" in message
    assert "--fresh" in message
    assert saved(stage, "runs/x") == [10], "and it is left as it is"


# Where a run begins.


@pytest.mark.parametrize("source", ["runs/old", "runs/old/checkpoints/step-00000010"], ids=["run", "step"])
def test_a_run_begins_with_the_weights_of_another_and_saves_them_at_once(stage: Stage, source: str) -> None:
    stage.run(*TRAIN, "train.max_steps=20", "run.dir=runs/old")
    said = stage.run(
        *TRAIN, "train.max_steps=5", "run.seed=7", "checkpoint.keep=9", "run.dir=runs/new", f"run.init_from={source}"
    )
    step = 10 if "step" in source else 20
    assert f"step-{step:08d}: 4 tensors taken" in said
    assert saved(stage, "runs/new") == [0, 5]
    old, new = stage.place.tensors("runs/old", step), stage.place.tensors("runs/new", 0)
    assert new.keys() == {name for name in old if name.startswith("model/")}, "and nothing of the optimizer"
    assert all(torch.equal(old[name], new[name]) for name in new)
    assert stage.place.metrics("runs/new")[0]["step"] == 1


def test_averaged_weights_are_what_another_run_begins_with(stage: Stage) -> None:
    averaged = [*TRAIN, "train.ema_decay=0.9"]
    stage.run(*averaged, "train.max_steps=20", "run.dir=runs/old")
    stage.run(*averaged, "train.max_steps=5", "checkpoint.keep=9", "run.dir=runs/new", "run.init_from=runs/old")
    old, new = stage.place.tensors("runs/old", 20), stage.place.tensors("runs/new", 0)
    for name in [name.removeprefix("model/") for name in new if name.startswith("model/")]:
        assert torch.equal(new[f"model/{name}"], old[f"ema/{name}"])
        assert torch.equal(new[f"ema/{name}"], old[f"ema/{name}"]), "the new average begins there"
        assert not torch.equal(new[f"model/{name}"], old[f"model/{name}"])


def test_a_run_that_began_elsewhere_never_needs_the_other_again(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=20", "run.dir=runs/old")
    words = [*TRAIN, "run.init_from=runs/old"]
    stage.run(*words, "run.dir=runs/whole")
    killed = stage.hold(*words, "run.dir=runs/killed", before=4, ranks=[0])  # the first periodic save comes at 10
    stage.kill_whole(killed)
    assert saved(stage, "runs/killed") == [0]
    shutil.rmtree(stage.folder / "runs/old")
    stage.run(*words, "run.dir=runs/killed")
    assert same(stage.place.tensors("runs/killed", 40), stage.place.tensors("runs/whole", 40))
    assert lines(stage, "runs/killed") == lines(stage, "runs/whole")


HEAD = "run.init_except=['layers.3.*']"  # of a perceptron with one hidden layer


def test_a_new_head_begins_anew_and_all_else_is_taken(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=5", "model.args.num_classes=12", "run.dir=runs/old")
    for name, more in (("new", [HEAD, "run.init_from=runs/old"]), ("scratch", ["train.on_nan=rollback"])):
        said = stage.run(*TRAIN, "train.max_steps=5", "checkpoint.keep=9", f"run.dir=runs/{name}", *more)
        if name == "new":
            assert "2 tensors taken\n  begin anew: layers.3.bias, layers.3.weight\n" in said
            assert "  not used: layers.3.bias, layers.3.weight\n" in said
    old, new, scratch = (
        stage.place.tensors(f"runs/{name}", step) for name, step in (("old", 5), ("new", 0), ("scratch", 0))
    )
    for name, tensor in new.items():
        assert torch.equal(tensor, (scratch if "layers.3." in name else old)[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "runs/old/checkpoints/step-00000005 and the model differ in\n  layers.3.bias: (12,) there, (10,) here\n  "
             "layers.3.weight: (12, 32) there, (10, 32) here\nuse a run of a model like this one, or say what is to "
             "begin anew, such as a new head: run.init_except=['layers.3.*']"),
        (["model.args.hidden=[32,10]"], "  layers.5.bias: only here\n"),
        (["model.args.hidden=[]"], "nothing of runs/old/checkpoints/step-00000005 fits the model"),
        (["run.init_except=['*']"], "nothing of runs/old/checkpoints/step-00000005 fits the model"),
        ([HEAD, "model.args.hidden=[32,16]"], "differ in\n  layers.5.bias: only here\n  layers.5.weight: only here\n"),
        (["run.init_except=['layer.3.*']"], "run.init_except: 'layer.3.*' matches none of the weights here or in runs"
                                            "/old/checkpoints/step-00000005; did you mean 'layers.3.*'? Their names: "),
        ([HEAD, "optimizer.lr_scale={layer.3.*: 2}"], "optimizer.lr_scale: 'layer.3.*' matches none of the model's 4 "),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_and_were_not_named_are_refused(stage: Stage, changes: list[str], words: str) -> None:
    stage.run(*TRAIN, "train.max_steps=5", "model.args.num_classes=12", "run.dir=runs/old")
    assert words in stage.place.refused(*TRAIN, "run.dir=runs/new", "run.init_from=runs/old", *changes)


def test_what_begins_anew_and_what_learns_faster_is_part_of_the_job(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=5", "run.dir=runs/old")
    words = [*TRAIN, "run.dir=runs/new", "run.init_from=runs/old"]
    stage.run(*words, HEAD, "train.max_steps=5", "optimizer.lr_scale={layers.3.*: 10}")
    refusal = stage.place.refused(*words)
    assert "run.init_except: ['layers.3.*'] -> []" in refusal
    assert "optimizer.lr_scale.layers.3.*: 10.0 -> None" in refusal


def test_learning_rates_by_pattern_go_through_a_kill(stage: Stage) -> None:
    words = [*TRAIN, "optimizer.lr_scale={layers.3.*: 10}"]
    stage.run(*words, "run.dir=runs/whole")
    stage.kill_whole(stage.hold(*words, "run.dir=runs/killed", before=13, ranks=[0]))
    stage.run(*words, "run.dir=runs/killed")
    assert same(stage.place.tensors("runs/killed", 40), stage.place.tensors("runs/whole", 40))
    assert lines(stage, "runs/killed") == lines(stage, "runs/whole")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("runs/old", "step-00000005 fits the model"),
        ("runs/gone", "runs/gone has no whole checkpoint"),
        ("http://[", ""),
    ],
)
def test_weights_that_are_not_there_or_do_not_fit_are_refused_with_nothing_written(
    stage: Stage, source: str, words: str
) -> None:
    stage.run("train", "digits.yaml", "train.max_steps=5", "model={name: cnn, args: {width: 8}}", "run.dir=runs/old")
    message = stage.place.refused(*TRAIN, "run.dir=runs/new", f"run.init_from={source}")
    assert words in message
    assert "init_from" in message or not words


def test_frozen_weights_stay_as_they_were_through_a_kill(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=10", "run.dir=runs/old")
    words = [*TRAIN, "run.init_from=runs/old", "train.freeze=['layers.1.*']", "checkpoint.keep=9"]
    killed = stage.hold(*words, "run.dir=runs/x", before=13, ranks=[0])
    stage.wait_for(lambda: 10 in saved(stage, "runs/x"), "checkpoint")
    stage.kill_whole(killed)
    assert "resuming at step 10" in stage.run(*words, "run.dir=runs/x")
    begin, end = stage.place.tensors("runs/x", 0), stage.place.tensors("runs/x", 40)
    frozen = {name for name in begin if "layers.1." in name}
    assert len(frozen) == 2
    assert {name for name in begin if torch.equal(begin[name], end[name])} == frozen
    assert not [name for name in end if name.startswith("optimizer/layers.1.")]


def test_what_is_frozen_is_not_unfrozen_by_a_resume(stage: Stage) -> None:
    stage.run(*TRAIN, "train.max_steps=5", "train.freeze=['layers.1.*']", "run.dir=runs/x")
    assert "train.freeze: ['layers.1.*'] -> []" in stage.place.refused(*TRAIN, "run.dir=runs/x")


def test_every_so_many_steps_a_checkpoint_stays_for_ever(stage: Stage) -> None:
    stage.run(*TRAIN, "checkpoint={every_steps: 4, keep: 2, keep_every: 12}", "run.dir=runs/x")
    assert saved(stage, "runs/x") == [12, 24, 36, 40]


# Saves that fail.


def break_saves(what: str) -> None:
    """While the file `broken` exists, nothing with such a name can be written. Status is told at once."""
    from toolkit import lock, storage
    from toolkit.checkpoint import Checkpointer
    from toolkit.observers.heartbeat import Heartbeat

    Heartbeat.PERIOD_S, lock.BEAT_S = 0.0, 0.2
    write, create, save = storage.write, storage.create, Checkpointer._save

    def saved(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.failure:
            Path("has-failed").touch()

    def check(url: str) -> None:
        if what in url and Path("broken").exists():
            raise OSError(28, "No space left on device", url)

    def broken_write(url: str, *args: Any, **options: Any) -> None:
        check(url)
        write(url, *args, **options)

    def broken_create(url: str, content: bytes) -> bool:
        check(url)
        return create(url, content)

    storage.write, storage.create, Checkpointer._save = broken_write, broken_create, saved


@pytest.mark.parametrize("what", ["data-", "state-", "manifest.json"])
def test_a_save_that_fails_is_loud_and_counted_and_the_next_one_works(stage: Stage, what: str) -> None:
    words = [*TRAIN, "run.dir=runs/x"]
    stage.run(*words[:-1], "run.dir=runs/whole")
    stage.place.prepare = (break_saves, (what,))
    training = stage.hold(*words, before=12, ranks=[0])
    stage.wait_for(lambda: saved(stage, "runs/x") == [10], "checkpoint")
    good = contents(stage.folder / "runs/x/checkpoints")
    (stage.folder / "broken").touch()
    (stage.folder / "hold-21-0").touch()
    (stage.folder / "hold-24-0").touch()
    (stage.folder / "hold-12-0").unlink()
    stage.wait_for((stage.folder / "has-failed").exists, "failed save", training)
    (stage.folder / "hold-21-0").unlink()
    stage.wait_for((stage.folder / "held-24-0").exists, "step 24", training)

    out, err = training.said()
    assert "WARNING: the checkpoint of step 20 could not be saved: " in out + err
    assert "No space left on device" in out + err
    assert "older ones are as they were" in out + err
    assert contents(stage.folder / "runs/x/checkpoints").items() >= good.items()
    counts = [(line["step"], line.get("checkpoint/failures", 0)) for line in stage.place.metrics("runs/x")]
    assert counts[:20] == [(step, 0) for step in range(1, 21)]
    assert counts[22:] == [(23, 1), (24, 1)]
    told = stage.wait_for(lambda: stage.place.status("runs/x")["checkpoint"]["failures"], "heartbeat", training)
    assert told == 1
    assert "step 20 could not be saved" in stage.place.status("runs/x")["checkpoint"]["failure"]

    (stage.folder / "broken").unlink()
    stage.release()
    out, _ = stage.end(training, 0)
    assert out.count("WARNING") == 1
    assert saved(stage, "runs/x") == [10, 30, 40]
    assert len(os.listdir(stage.folder / "runs/x/checkpoints")) == 3, "nothing is left of the one that failed"
    status = stage.place.status("runs/x")
    assert (status["state"], status["checkpoint"]["failures"], status["checkpoint"]["failure"]) == (
        "completed",
        1,
        None,
    )
    assert same(stage.place.tensors("runs/x", 40), stage.place.tensors("runs/whole", 40))
    assert lines(stage, "runs/x") == lines(stage, "runs/whole")


@pytest.mark.parametrize("mended", [False, True], ids=["broken-for-good", "mended-at-once"])
def test_a_job_may_stop_at_the_first_save_that_fails(stage: Stage, mended: bool) -> None:
    words = [*TRAIN, "checkpoint.on_error=stop", "train.max_steps=400", "run.dir=runs/x"]
    stage.place.prepare = (break_saves, ("data-",))
    training = stage.hold(*words, before=12, ranks=[0])
    stage.wait_for(lambda: saved(stage, "runs/x") == [10], "checkpoint")
    (stage.folder / "broken").touch()
    if mended:
        (stage.folder / "hold-20-0").touch()
    (stage.folder / "hold-12-0").unlink()
    if mended:
        stage.wait_for((stage.folder / "has-failed").exists, "failed save", training)
        (stage.folder / "broken").unlink()
        stage.release()
    _, err = stage.end(training, 1)
    assert "could not be saved" in err
    assert "Traceback" not in err
    status = stage.place.status("runs/x")
    assert (status["state"], status["exit"]) == ("failed", 1)
    assert status["step"] < 400
    (stage.folder / "broken").unlink(missing_ok=True)
    stage.run(*words)
    assert saved(stage, "runs/x")[-1] == 400


def test_a_run_whose_last_save_fails_has_failed_and_goes_on_from_the_one_before(stage: Stage) -> None:
    words = [*TRAIN, "run.dir=runs/x"]
    stage.place.prepare = (break_saves, ("data-",))
    training = stage.hold(*words, before=36, ranks=[0])
    stage.wait_for(lambda: 30 in saved(stage, "runs/x"), "checkpoint")
    (stage.folder / "broken").touch()
    stage.release()
    _, err = stage.end(training, 1)
    assert "the checkpoint of step 40 could not be saved" in err
    assert "the newest checkpoint is that of step 30" in err
    assert "the same command goes on" in err
    status = stage.place.status("runs/x")
    assert (status["state"], status["exit"]) == ("failed", 1)
    assert "step 40 could not be saved" in status["reason"]

    (stage.folder / "broken").unlink()
    assert "resuming at step 30" in stage.run(*words)
    assert stage.place.status("runs/x")["state"] == "completed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_of("6m", tmp_path) as place:
        yield place


def test_a_full_disk_fails_saves_and_tears_nothing_and_all_is_well_when_there_is_room_again(
    stage: Stage, small_disk: Path
) -> None:
    run, ballast, words = str(small_disk / "run"), small_disk / "ballast", [*TRAIN, "checkpoint.keep=9"]
    stage.run(*words, "run.dir=runs/whole")
    stage.place.prepare = (break_saves, ("",))  # which tells of failures
    training = stage.hold(*words, f"run.dir={run}", before=12, ranks=[0])
    stage.wait_for(lambda: saved(stage, run) == [10], "checkpoint", training)
    before = contents(small_disk / "run/checkpoints")
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass  # full
    (stage.folder / "hold-25-0").touch()
    (stage.folder / "hold-12-0").unlink()
    stage.wait_for((stage.folder / "has-failed").exists, "failed save", training)
    stage.wait_for((stage.folder / "held-25-0").exists, "steps on a full disk", training)
    (stage.folder / "hold-28-0").touch()
    (stage.folder / "hold-25-0").unlink()
    stage.wait_for((stage.folder / "held-28-0").exists, "steps on a full disk", training)
    out, _ = training.said()
    assert "WARNING: the checkpoint of step 20 could not be saved: [Errno 28] No space left on device" in out
    assert contents(small_disk / "run/checkpoints") == before
    ballast.unlink()
    stage.release()
    stage.end(training, 0)
    assert stage.place.status(run)["state"] == "completed"
    assert saved(stage, run) == [10, 30, 40]
    assert same(stage.place.tensors(run, 40), stage.place.tensors("runs/whole", 40))
    assert lines(stage, run) == lines(stage, "runs/whole"), "also those that found no room at first"
    assert not list(small_disk.rglob(".tmp-*"))
