"""Whose fault it is that an attempt failed: the job's, a node's, or something's around them. No rank is real."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit import diagnosis, verdict
from toolkit.attempt import Look, Note
from toolkit.cluster.step import Step
from toolkit.deaths import of_the_machine
from toolkit.distributed import Ranks, choose_device
from toolkit.errors import JobError


def note(message: str, status: int = 1, **changes: Any) -> Note:
    """The last words of a rank."""
    return {"pid": 7, "host": "n1", "exit": status, "message": message, "time_s": 0.0, "blamed": None} | changes


class Ended:
    """Of an attempt, what a verdict asks for."""

    def __init__(self, processes: int) -> None:
        self.processes = processes


def test_the_first_to_fail_is_the_first_though_the_clock_of_its_node_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(clock_s: float, rank: int, ago_s: float, message: str) -> Look:
        """What a node with that clock tells a supervisor whose own says 1000."""
        monkeypatch.setattr(time, "time", lambda: clock_s)
        told = json.loads(json.dumps(Look({rank: note(message, time_s=clock_s - ago_s)}).encoded()))
        monkeypatch.setattr(time, "time", lambda: 1000.0)
        return Look.decoded(told)

    first, second = seen(1000.2, 1, 0.1, "IndexError"), seen(1000.0, 0, 0.05, "Connection closed by peer")
    outcome = verdict.in_words(Ended(2), Look({**second.notes, **first.notes}))
    assert outcome.message == "rank 1: IndexError"


NO_GPU = "local rank 3 has no GPU of its own: 3 visible; start fewer processes"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:25083"


@pytest.mark.parametrize(
    ("message", "blames"),
    [
        ("AcceleratorError: CUDA error: uncorrectable ECC error encountered", True),
        ("AcceleratorError: CUDA error: unspecified launch failure", True),
        ("DistBackendError: NCCL error in: NCCLUtils.cpp:77\nncclSystemError: System call (e.g. socket) failed", True),
        (NO_GPU, True),
        ("AcceleratorError: CUDA error: device-side assert triggered", False),
        ("DistBackendError: NCCL error in: NCCLUtils.cpp:77\nncclInvalidUsage: Duplicate GPU detected", False),
        (f"RuntimeError: {GLOO}", False),
        ("IndexError: list index out of range", False),
    ],
)
def test_what_hardware_says_blames_its_node(message: str, blames: bool) -> None:
    outcome = verdict.in_words(Ended(2), Look({1: note(message), 0: note(f"RuntimeError: {GLOO}", time_s=1.0)}))
    assert outcome.failure.blames_host == blames
    assert (outcome.failure.rank, outcome.failure.host) == (1, "n1")


def test_a_node_that_lacks_a_gpu_or_a_folder_is_blamed_in_the_words_that_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(JobError) as refused:
        choose_device("cuda", Ranks(3, 4, 3))
    assert str(refused.value) == NO_GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(JobError) as refused:
        choose_device("cuda", Ranks(3, 4, 3))
    assert of_the_machine(str(refused.value))
    node: Any = SimpleNamespace(host="n2", missing=["/scratch/x"])
    unseen = Step._unseen(SimpleNamespace(per_node=4), 1, node)
    outcome = verdict.in_words(Ended(8), Look(unseen, places={4: "n2"}))
    assert (outcome.status, outcome.failure.blames_host, outcome.failure.host) == (2, True, "n2")


class CompiledError(RuntimeError):
    """What torch.compile makes of an error in its backend."""

    inner_exception = OSError("No space left on device")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), False),
        (torch.distributed.DistNetworkError("the store has gone"), False),
        (RuntimeError(GLOO), False),
        (OSError("Stale file handle"), False),
        (CompiledError(), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (FileNotFoundError(2, "No such file or directory", "vocabulary.txt"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
    ],
)
def test_a_first_step_that_fails_is_the_jobs_fault_unless_something_around_it_has_failed(
    error: Exception, refused: bool
) -> None:
    trainer: Any = SimpleNamespace(evaluating=True, state=SimpleNamespace(step=0))  # so that no sample is looked at
    found = diagnosis.refusal(error, trainer, None)
    assert isinstance(found, JobError) if refused else found is error
