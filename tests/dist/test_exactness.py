"""N steps are k steps, kill -9 and a resume, bit for bit: every tensor of the checkpoint and every line of metrics."""

from collections.abc import Callable
from typing import Any

import pytest

from toolkit.proof import NOT_OF_THE_JOB

STEPS = 24
END = [f"train.max_steps={STEPS}", "checkpoint.every_steps=5", "schedule.name=held:cosine"]
CNN = ["train", "jobs/digits_cnn.yaml", *END, "eval.every_epochs=1"]
GPT = [
    "train", "jobs/char_gpt.yaml", *END, "model.args.layers=2", "model.args.width=32", "data.global_batch_size=32",
    "data.train.args.context=32", "data.val.args.context=32", "eval.batch_size=256",
    "eval.every_epochs=null", "eval.every_steps=12",
]  # fmt: skip


def options(processes: int, workers: int, micro_batch_size: int, log_every: int) -> list[str]:
    return [
        f"--processes={processes}", f"data.workers={workers}", f"train.micro_batch_size={micro_batch_size}",
        f"log.every_steps={log_every}",
    ]  # fmt: skip


def without_speed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics as far as they are a function of the job."""
    return [{key: value for key, value in line.items() if key not in NOT_OF_THE_JOB} for line in lines]


# Each job at each number of ranks, each number of ranks with and without loader workers. Micro-batches never divide
# the share evenly, and the last line of metrics before a kill lies on and off a checkpoint.
@pytest.mark.parametrize(
    ("job", "processes", "workers", "micro_batch_size", "log_every", "killed_after"),
    [
        pytest.param(CNN, 1, 0, 24, 1, [13], id="cnn-1-rank"),
        pytest.param(CNN, 2, 2, 12, 3, [8, 19], id="cnn-2-ranks-workers-twice"),
        pytest.param(CNN, 4, 0, 6, 1, [17], id="cnn-4-ranks"),
        pytest.param(GPT, 1, 2, 12, 4, [7, 13], id="gpt-1-rank-workers-twice"),
        pytest.param(GPT, 2, 0, 6, 1, [18], id="gpt-2-ranks"),
        pytest.param(GPT, 4, 2, 5, 7, [12], id="gpt-4-ranks-workers"),
    ],
)
def test_a_killed_and_resumed_run_ends_bit_equal(
    stage: Any,
    equal: Callable[..., bool],
    job: list[str],
    processes: int,
    workers: int,
    micro_batch_size: int,
    log_every: int,
    killed_after: list[int],
) -> None:
    words = [*job, *options(processes, workers, micro_batch_size, log_every)]
    stage.run(*words, "run.dir=runs/whole")

    for step in killed_after:
        process = stage.hold(*words, "run.dir=runs/killed", before=step, ranks=range(processes))
        stage.wait_for_save("runs/killed", step // 5 * 5)
        stage.kill_whole(process)
        saved = stage.newest_save("runs/killed")  # that of the best, too, is one, and may have become whole since
        assert stage.place.status("runs/killed")["state"] == "running"  # nobody had time to say anything
    said = stage.run(*words, "run.dir=runs/killed")

    assert f"resuming at step {saved}" in said
    assert stage.place.status("runs/killed")["attempt"] == len(killed_after) + 1
    for step in (20, STEPS):
        assert equal(stage.place.tensors("runs/killed", step), stage.place.tensors("runs/whole", step))
    lines, undisturbed = stage.place.metrics("runs/killed"), stage.place.metrics("runs/whole")
    assert without_speed(lines) == without_speed(undisturbed)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "one line a step"


def test_the_metrics_of_a_past_that_is_no_more_are_cut(stage: Any) -> None:
    words = [*CNN, *options(1, 0, 64, 1), "run.dir=runs/cut"]
    process = stage.hold(*words, before=13, ranks=[0])
    assert [line["step"] for line in stage.place.metrics("runs/cut")] == list(range(1, 14))
    stage.kill_whole(process)
    with open(stage.folder / "runs/cut/metrics.jsonl", "a") as journal:
        journal.write('{"step": 14, "train/lo')  # a kill may end a line anywhere

    process = stage.hold(*words, before=10, ranks=[0])
    assert [line["step"] for line in stage.place.metrics("runs/cut")] == list(range(1, 11))
    stage.kill_whole(process)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_half_written_checkpoint_is_passed_over_and_written_again(
    stage: Any, equal: Callable[..., bool], processes: int
) -> None:
    words = [*CNN, *options(processes, 0, 24, 1)]
    stage.run(*words, "run.dir=runs/whole")
    process = stage.hold(*words, "run.dir=runs/half", before=11, ranks=range(processes))
    stage.wait_for_save("runs/half", 10)
    stage.kill_whole(process)
    half = stage.folder / "runs/half/checkpoints/step-00000010"
    (half / "manifest.json").unlink()
    next(half.glob("data-*")).write_bytes(b"half")

    assert "resuming at step 5" in stage.run(*words, "run.dir=runs/half")
    for step in (20, STEPS):
        assert equal(stage.place.tensors("runs/half", step), stage.place.tensors("runs/whole", step))
