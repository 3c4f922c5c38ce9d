"""Training on a store that breaks: it goes on, old checkpoints stay whole, later saves work, it ends bit-equal."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.campaigns import starts
from tests.campaigns.starts import Forked
from tests.conftest import DIGITS, tensors_of
from tests.dist.conftest import Stage, staged
from tests.store.servers import FaultProxy, S3Server, is_open, used
from tests.test_lock import race
from tests.test_persistence import hold_commit
from toolkit import storage
from toolkit.checkpoint import Archive
from toolkit.proof import NOT_OF_THE_JOB
from toolkit.run import Run

STEPS = 60
TRAIN = [
    "train", "digits.yaml", f"train.max_steps={STEPS}", "checkpoint.keep=9", "schedule.name=held:cosine",
    "log.every_steps=3",
]  # fmt: skip
ALL = list(range(10, STEPS + 1, 10))


@pytest.fixture(scope="session", autouse=True)
def forkserver() -> None:
    starts.warm()


@pytest.fixture
def stage(workplace: Any) -> Iterator[Stage]:
    """A workplace whose commands start quickly and can be held before a step."""
    with staged(Forked(workplace.folder)) as stage:
        yield stage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same job on the local disk, with nothing in its way."""
    stage = Stage(Forked(tmp_path_factory.mktemp("undisturbed")))
    stage.place.write("digits.yaml", DIGITS)
    stage.run(*TRAIN, "run.dir=whole")
    return str(stage.folder / "whole")


@dataclass
class BlackHole:
    """A run that trains while its store answers nothing."""

    stage: Stage
    training: Any
    proxy: FaultProxy
    url: str
    begun_s: float  # since the epoch


@pytest.fixture(scope="module", autouse=True)
def black_hole(s3_process: S3Server, tmp_path_factory: pytest.TempPathFactory, forkserver: None) -> Iterator[BlackHole]:
    """From before this file's first test to its last, which looks at it: a minute that nobody waits for."""
    if not is_open(s3_process.port):
        s3_process.start()
    stage = Stage(Forked(tmp_path_factory.mktemp("black-hole"), (note_failures, ())))
    stage.place.write("digits.yaml", DIGITS)
    with FaultProxy(s3_process) as proxy:
        url = proxy.fresh_url()
        training = stage.hold(*TRAIN, f"run.dir={url}", before=12, ranks=[0], **proxy.environment)
        with used(proxy.environment):
            stage.wait_for(lambda: saved(url) == [10], "checkpoint", training)
        proxy.fault("hang")
        (stage.folder / "hold-29-0").touch()  # before another save: it would fail, too, if the tests between are slow
        begun_s = time.time()
        (stage.folder / "hold-12-0").unlink()
        yield BlackHole(stage, training, proxy, url, begun_s)
        training.kill()
        training.wait(30)


def note_failures() -> None:
    """When the save of a step has failed there is a file `failed-STEP`."""
    from toolkit.checkpoint import Checkpointer

    save = Checkpointer._save

    def noted(self: Any, step: int, *what: Any) -> None:
        save(self, step, *what)
        if self.failure:
            Path(f"failed-{step}").touch()

    Checkpointer._save = noted


def lines(url: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in Run(url).metrics.read()
    ]


def saved(url: str) -> list[int]:
    return Archive(f"{url}/checkpoints").steps()


def verified(url: str) -> list[int]:
    """The steps of all checkpoints, every byte read."""
    archive = Archive(f"{url}/checkpoints")
    return [archive.verify(step).step for step in archive.folders()]


def contents(url: str) -> dict[str, bytes]:
    """Every file under a URL of a run, which is two folders deep."""
    found = {}
    for name in storage.names(url):
        for path in [name, *(f"{name}/{inner}" for inner in storage.names(f"{url}/{name}"))]:
            for file in storage.sizes(f"{url}/{path}"):
                found[f"{path}/{file}"] = storage.read(f"{url}/{path}/{file}")
    return found | {name: storage.read(f"{url}/{name}") for name in storage.sizes(url)}


def assert_ended_like(undisturbed: str, url: str, missing: tuple[int, ...] = ()) -> None:
    status = Run(url).status()
    assert (status["state"], status["exit"]) == ("completed", 0)
    assert verified(url) == [step for step in ALL if step not in missing]
    one, other = tensors_of(undisturbed, STEPS), tensors_of(url, STEPS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert lines(url) == lines(undisturbed)


FAULTS = [("reset", 0), ("refuse", 0), ("hang", 0), ("503", 8), ("cut", 9000), ("deaf", 5), ("bodiless", 5)]


@pytest.mark.parametrize(("kind", "amount"), FAULTS, ids=[kind for kind, _ in FAULTS])
def test_a_fault_that_passes_costs_nothing(
    stage: Stage, proxy: FaultProxy, s3_server: S3Server, undisturbed: str, kind: str, amount: int
) -> None:
    url = proxy.fresh_url()
    training = stage.hold(*TRAIN, f"run.dir={url}", before=12, ranks=[0], **proxy.environment)
    stage.wait_for(lambda: saved(url) == [10], "checkpoint", training)
    proxy.fault(kind, amount)
    (stage.folder / "hold-29-0").touch()
    (stage.folder / "hold-12-0").unlink()
    stage.wait_for((stage.folder / "held-29-0").exists, "steps beside a save that cannot be written", training)
    if not amount:
        proxy.fault("pass")
    stage.release()
    out, err = stage.end(training, 0)
    assert "WARNING" not in out + err
    assert_ended_like(undisturbed, url)
    assert not s3_server.uploads()


def stop_in_save() -> None:
    """The save of step 20 waits in its middle while the file `go` does not exist."""
    from toolkit import storage

    write = storage.write

    def held(url: str, *what: Any, **options: Any) -> None:
        if "step-00000020/state-" in url and not Path("in-save").exists():
            Path("in-save").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        write(url, *what, **options)

    storage.write = held


def test_a_server_that_is_killed_in_a_save_and_comes_back_costs_nothing(
    stage: Stage, s3_server: S3Server, undisturbed: str
) -> None:
    url = s3_server.fresh_url()
    stage.place.prepare = (stop_in_save, ())
    training = stage.hold(*TRAIN, f"run.dir={url}", before=29, ranks=[0], **s3_server.environment)
    stage.wait_for((stage.folder / "in-save").exists, "save", training)
    s3_server.kill()
    killed_s = time.monotonic()
    (stage.folder / "go").touch()
    time.sleep(5)  # how long it is away
    s3_server.start()
    assert time.monotonic() - killed_s < 30, "or the save has failed by now"
    assert Archive(f"{url}/checkpoints").verify(10)
    stage.release()
    out, err = stage.end(training, 0)
    assert "WARNING" not in out + err
    assert_ended_like(undisturbed, url)
    assert not s3_server.uploads()


def test_credentials_that_are_revoked_fail_a_save_at_once_and_the_next_works_with_new_ones(
    stage: Stage, proxy: FaultProxy, s3_server: S3Server, undisturbed: str
) -> None:
    url = proxy.fresh_url()
    stage.place.prepare = (note_failures, ())
    training = stage.hold(*TRAIN, f"run.dir={url}", before=12, ranks=[0], **proxy.environment)
    stage.wait_for(lambda: saved(url) == [10], "checkpoint", training)
    before = contents(f"{url}/checkpoints")
    proxy.fault("403")
    (stage.folder / "hold-32-0").touch()
    (stage.folder / "hold-12-0").unlink()
    for step in (20, 30):
        stage.wait_for((stage.folder / f"failed-{step}").exists, "failed save", training)
    proxy.fault("pass")
    assert contents(f"{url}/checkpoints") == before
    assert verified(url) == [10]
    stage.release()
    out, _ = stage.end(training, 0)
    assert "WARNING: the checkpoint of step 20 could not be saved: " in out
    assert "Access Denied.; check the credentials" in out
    assert Run(url).status()["checkpoint"]["failures"] == 2
    assert Run(url).metrics.read()[-1]["checkpoint/failures"] == 2
    assert_ended_like(undisturbed, url, missing=(20, 30))
    assert not s3_server.uploads()


def test_two_ranks_on_s3_are_killed_and_end_bit_equal(stage: Stage, s3_server: S3Server) -> None:
    url, words = s3_server.fresh_url(), [*TRAIN, "--processes=2"]
    stage.run(*words, "run.dir=whole")
    training = stage.hold(*words, f"run.dir={url}", before=29, ranks=[0, 1], **s3_server.environment)
    stage.wait_for(lambda: 20 in saved(url), "checkpoint", training)
    stage.kill_whole(training)
    said = stage.run(*words, f"run.dir={url}", **s3_server.environment)
    assert "resuming at step 20" in said
    assert_ended_like(str(stage.folder / "whole"), url)
    assert not s3_server.uploads()


def test_a_suspended_writer_on_s3_that_was_taken_over_changes_nothing(
    stage: Stage, s3_server: S3Server, undisturbed: str
) -> None:
    url = s3_server.fresh_url()
    stage.place.prepare = (hold_commit, (False,))
    old = stage.start(*TRAIN, f"run.dir={url}", **s3_server.environment, SLURM_JOB_ID="7")
    stage.wait_for((stage.folder / "committing").exists, "save", old)
    old.send_signal(signal.SIGSTOP)
    stage.place.prepare = None
    again = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    stage.run(*TRAIN, f"run.dir={url}", **s3_server.environment, **again)
    before = contents(url)
    old.send_signal(signal.SIGCONT)
    (stage.folder / "go").touch()
    _, err = stage.end(old, 1)
    assert "attempt 2" in err
    assert contents(url) == before
    assert_ended_like(undisturbed, url)


def test_of_eight_that_start_at_once_on_s3_one_gets_the_attempt(s3_server: S3Server) -> None:
    said = race(place := s3_server.fresh_url() + "/lock", **s3_server.environment)
    assert sorted(words.split()[0] for words in said) == ["refused"] * 7 + ["won"]
    assert storage.names(place) == ["attempt-0001.json"]


def test_a_black_hole_fails_a_save_within_a_minute_and_training_goes_on(
    black_hole: BlackHole, s3_server: S3Server, undisturbed: str
) -> None:
    stage, training, url = black_hole.stage, black_hole.training, black_hole.url
    stage.wait_for((stage.folder / "failed-20").exists, "end of the save", training)
    assert (stage.folder / "failed-20").stat().st_mtime - black_hole.begun_s < 60
    stage.wait_for((stage.folder / "held-29-0").exists, "steps beside it", training)
    black_hole.proxy.fault("pass")
    assert verified(url) == [10]
    stage.release()
    out, _ = stage.end(training, 0)
    assert "WARNING: the checkpoint of step 20 could not be saved: " in out
    assert "times over 45 s" in out
    assert Run(url).status()["checkpoint"]["failures"] == 1
    assert_ended_like(undisturbed, url, missing=(20,))
    assert not s3_server.uploads()
