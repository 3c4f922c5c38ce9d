"""A NaN that one of two ranks meets, under each policy: who and what is named, and how the run ends."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.planted import bad, plant, sample_of, skip_from_the_start

TRAIN = ["train", "planted.yaml", "--processes=2"]
STEPS, LOST = 24, 12  # the lost step counted from 0; it is looked at with the save of step 15
POSITIONS = [LOST * 32, LOST * 32 + 31]


def events(stage: Any, run: str) -> list[dict[str, Any]]:
    lines = stage.place.metrics(run)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "one line a step"
    return [event for line in lines for event in line.get("events", [])]


def test_stop_names_the_rank_the_step_and_the_sample_and_tries_once_more(stage: Any) -> None:
    plant(stage)
    sample = sample_of(LOST)
    said = stage.run(*TRAIN, *bad(sample), "run.dir=runs/x", status=1)
    cause = f"rank 1's loss is nan in step {LOST + 1} (positions {POSITIONS[0]} to {POSITIONS[1]} of the stream): "
    cause += f"sample {sample} of planted.bin: its input has a nan or infinite value"
    assert said.count(f"rank 1: {cause}") == 2, "at first, and when it has come back"
    assert "starting again from the checkpoint of step 10 (restart 1 of 3)" in said
    assert "not started again: the same failure has come back" in said
    page = (stage.folder / "runs/x/postmortem.md").read_text()
    assert "| first to fail | rank 1 |" in page
    assert cause in page
    status = stage.place.status("runs/x")
    assert (status["state"], status["attempt"]) == ("failed", 2)
    assert cause in status["reason"]
    assert not stage.alive()


# Micro-batches that do not divide the share, an average, and clipping or not.
@pytest.mark.parametrize(("ranks", "clip"), [(2, "1.0"), (4, "null")])
def test_skip_ends_as_if_the_step_had_been_left_out(
    stage: Any, equal: Callable[..., bool], ranks: int, clip: str
) -> None:
    plant(stage)
    words = [
        *TRAIN[:-1], f"--processes={ranks}", "train.micro_batch_size=6", "train.ema_decay=0.9",
        f"train.clip_grad_norm={clip}",
    ]  # fmt: skip
    said = stage.run(*words, *bad(sample_of(LOST, 1, ranks)), "train.on_nan=skip", "run.dir=runs/skipped")
    omitting = f"optimizer={{name: planted:Omitting, args: {{lr: 3e-3, omitted: {LOST}}}}}"
    stage.run(*words, omitting, "run.dir=runs/omitted")

    assert equal(stage.place.tensors("runs/skipped", STEPS), stage.place.tensors("runs/omitted", STEPS))
    (event,) = events(stage, "runs/skipped")
    why = f"rank 1's loss is nan in step {LOST + 1}"
    assert event == {"event": "skip", "step": LOST + 1, "rank": 1, "positions": POSITIONS, "why": why}
    assert said.count(why) == 1
    assert all(line["train/loss"] > 0 for line in stage.place.metrics("runs/skipped")), "of the other steps"


def test_rollback_ends_as_if_the_batch_had_never_been_in_the_stream_killed_or_not(
    stage: Any, equal: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(stage)
    monkeypatch.syspath_prepend(str(stage.folder))
    skip_from_the_start(stage.folder, "runs/without", LOST)
    stage.run(*TRAIN, "run.dir=runs/without")
    words = [*TRAIN, *bad(sample_of(LOST)), "train.on_nan=rollback", "data.workers=1"]
    said = stage.run(*words, "run.dir=runs/whole")
    process = stage.hold(*words, "run.dir=runs/killed", before=18, ranks=[0, 1])
    stage.wait_for_save("runs/killed", 15)
    stage.kill_whole(process)
    assert "resuming at step 15" in stage.run(*words, "run.dir=runs/killed")

    why = f"rank 1's loss is nan in step {LOST + 1}"
    assert said.count(why) == 1
    assert "rolled back to step 10" in said
    without = stage.place.tensors("runs/without", STEPS)
    for run in ("runs/whole", "runs/killed"):
        assert equal(stage.place.tensors(run, STEPS), without)
        (event,) = events(stage, run)
        assert event == {
            "event": "rollback", "step": LOST + 1, "rank": 1, "positions": POSITIONS, "to": 10, "why": why,
        }  # fmt: skip
        assert stage.place.status(run)["state"] == "completed"
        losses = [(line["step"], line["train/loss"]) for line in stage.place.metrics(run)]
        assert losses == [(line["step"], line["train/loss"]) for line in stage.place.metrics("runs/without")]
    state = next((stage.folder / f"runs/killed/checkpoints/step-{STEPS:08d}").glob("state-*.json"))
    assert json.loads(state.read_text())["skipped"] == [LOST]
