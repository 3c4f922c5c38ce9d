"""The composition root, where no command is needed to see what it does."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit
from tests.conftest import DIGITS, tensors_of
from toolkit import JobError, Run, distributed, load_job
from toolkit.config import Job
from toolkit.datasets.loader import TrainingSteps
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.session import Parts, settled

TEXT = """
task: language_modeling
data: {train: {name: text, args: {path: text.txt, context: 8, split: all}}, global_batch_size: 4}
model: {name: gpt, args: {layers: 1, heads: 1, width: 8}}
optimizer: {name: adamw, args: {lr: 1e-3}}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job on the CPU, with changes, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(DIGITS)
    Path("text.yaml").write_text(TEXT)

    def job(name: str, *changes: str) -> Job:
        return load_job(f"{name}.yaml", ["train.device=cpu", "checkpoint={every_steps: 2, keep: 9}", *changes], {})

    return job


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_was_there_before_a_run_is_looked_through_for_garbage_only_after_it() -> None:
    with pytest.raises(ValueError, match="lost"), settled():
        assert gc.get_freeze_count() > 10_000
        raise ValueError("lost")
    assert gc.get_freeze_count() == 0


def parts_of(samples: int, batch: int) -> Parts:
    sampler = ElasticDistributedSampler(range(samples), global_batch_size=batch)
    trainer: Any = None
    return Parts(trainer, TrainingSteps(range(samples), sampler), None, None, {})


def test_epochs_are_counted_in_whole_numbers(job: Any) -> None:
    assert parts_of(50, 3).epoch_of(250) == 15
    parts, every_three = parts_of(540, 100), job("digits", "eval={every_epochs: 3}")
    assert [step for step in range(1, 100) if parts.evaluates_after(every_three, step)] == [17, 33, 49, 65, 81, 98]


def test_a_run_beyond_the_end_of_its_job_is_refused_with_nothing_written(job: Any) -> None:
    toolkit.train(job("digits", "train.max_steps=6", "run.dir=x"))
    before = contents("x")
    with pytest.raises(JobError, match=r"x is at step 6, and the job ends at step 4: raise .* fork x --at .* --fresh"):
        toolkit.train(job("digits", "train.max_steps=4", "run.dir=x"))
    assert contents("x") == before
    assert toolkit.train(job("digits", "train.max_steps=6", "train.epochs=9", "run.dir=x")).state == "completed"


def test_a_run_whose_data_have_grown_is_refused_with_nothing_written(job: Any) -> None:
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    toolkit.train(job("text", "train.max_steps=3", "run.dir=x"))
    before = contents("x")
    with open("text.txt", "a") as text:
        text.write("the quick brown fox jumps over the lazy dog " * 9)
    with pytest.raises(
        JobError, match=r"x holds a run on other data .*\n  samples: 49 -> 98\nput the data back as they"
    ):
        toolkit.train(job("text", "train.max_steps=5", "run.dir=x"))
    assert contents("x") == before


def test_rank_0_chooses_for_all_with_which_weights_of_a_run_in_training_they_begin(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit.train(job("digits", "train.max_steps=6", "run.dir=old"))

    def earlier(decide: Any) -> Any:
        """What rank 0 has found, when step 6 was not there yet."""
        return 4 if (found := decide()) == 6 else found

    monkeypatch.setattr(distributed, "from_rank_0", earlier)
    toolkit.train(job("digits", "train.max_steps=1", "run.dir=new", "run.init_from=old"))
    assert Run("new").checkpoints.steps() == [0, 1]
    old, new = tensors_of("old", 4), tensors_of("new", 0)
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.items())


def test_a_rank_that_sees_other_data_is_named_with_nothing_written(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gathered", lambda told: [told, told | {"samples": 1437}])
    with pytest.raises(JobError, match=r"rank 1 sees other training data than rank 0:\n  samples: 1294 -> 1437\n"):
        toolkit.train(job("digits", "run.dir=x"))
    assert not Path("x").exists()
