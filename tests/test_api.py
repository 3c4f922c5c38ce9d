"""What `import toolkit` offers: these names, documented, and what they promise to programs of one's own."""

import inspect
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toolkit
from tests.conftest import DIGITS, Workplace
from toolkit import Checkpointer, JobError, Run, RunError, Trainer, load_job
from toolkit.checkpoint import export
from toolkit.datasets.digits import Digits
from toolkit.datasets.loader import Batch
from toolkit.randomness import seed_everything
from toolkit.signals import STOPPING
from toolkit.tasks import Classification

PUBLIC = {
    "Checkpointer", "ElasticDistributedSampler", "JobError", "Run", "RunError", "Trainer", "launch", "load_job",
    "submit", "train",
}  # fmt: skip
OF_A_RUN = {"status", "metrics", "checkpoints", "load_model", "job"}


def test_these_are_the_public_names_and_each_is_documented() -> None:
    assert set(toolkit.__all__) == PUBLIC | {"__version__"}
    assert set(dir(toolkit)) >= PUBLIC | {"__version__", "__name__"}
    for name in PUBLIC:
        assert len((inspect.getdoc(getattr(toolkit, name)) or "").split()) >= 5, f"{name} says nothing of itself"
    assert set(dir(Run("runs/x"))) >= OF_A_RUN
    assert repr(Run("runs/x")) == "Run('runs/x')"
    with pytest.raises(AttributeError, match="has no attribute 'Runs'; it has .*Run, "):
        toolkit.Runs  # noqa: B018


@pytest.mark.parametrize("name", ["train", "launch", "submit", "load_job"])
def test_the_functions_say_when_they_raise(name: str) -> None:
    assert "Raises JobError" in (inspect.getdoc(getattr(toolkit, name)) or "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 40 steps with averaged weights, checkpoints at 10, 20, 30 and 40, and the best of them marked."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "digits.yaml").write_text(DIGITS)
    settings = [
        f"run.dir={folder}/runs/x", "train.ema_decay=0.5", "train.device=cpu", "eval={every_steps: 10}",
        "checkpoint={every_steps: 10, keep: 9, best: {metric: val/loss, mode: min}}",
    ]  # fmt: skip
    result = toolkit.train(load_job(str(folder / "digits.yaml"), settings))
    assert (result.state, result.step) == ("completed", 40)
    return Run(result.url)


def test_training_leaves_the_signals_as_they_were(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    assert toolkit.train(trained.job()).state == "completed"
    monkeypatch.setattr("toolkit.session.Run", None)
    with pytest.raises(TypeError):
        toolkit.train(trained.job())
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.pthread_sigmask(signal.SIG_SETMASK, mask) == {signal.SIGUSR1}


def test_training_in_a_thread_is_refused_with_the_remedy(trained: Run) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(JobError, match=r"main thread.*use toolkit\.launch"):
        pool.submit(toolkit.train, trained.job()).result()


def loss_of(model: nn.Module) -> float:
    """The mean loss over the test set."""
    digits = Digits("test")
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(digits.inputs), digits.targets))


def test_a_run_tells_its_status_metrics_and_checkpoints(trained: Run) -> None:
    assert (trained.status() or {})["state"] == "completed"
    assert [line["step"] for line in trained.metrics.read()] == [10, 20, 30, 40]
    assert trained.checkpoints.steps() == [10, 20, 30, 40]
    losses = {line["step"]: line["val/loss"] for line in trained.metrics.read()}
    assert trained.checkpoints.best() == min(losses, key=lambda step: losses[step])
    assert trained.job().train.max_steps == 40


def test_a_loaded_model_is_the_one_that_was_evaluated(trained: Run) -> None:
    model = trained.load_model()
    assert not model.training
    assert loss_of(model) == pytest.approx(trained.metrics.read()[-1]["test/loss"], rel=1e-5)
    raw = trained.load_model("last", averaged=False)
    assert loss_of(raw) != pytest.approx(loss_of(model), rel=1e-5)


@pytest.mark.parametrize("which", ["best", 20, "20"])
def test_any_checkpoint_can_be_loaded(trained: Run, which: str | int) -> None:
    step = trained.checkpoints.best() if which == "best" else 20
    entries = trained.checkpoints.verify(step or 0).tensors
    model = trained.load_model(which)
    assert {f"ema/{name}" for name, _ in model.named_parameters()} <= entries.keys()
    assert loss_of(model) == loss_of(trained.load_model(step or 0))


def test_loading_a_model_disturbs_nothing_that_is_random(trained: Run) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    seed_everything(1)
    expected = drawn()
    seed_everything(1)
    trained.load_model()
    assert drawn() == expected


def test_a_model_is_loaded_in_the_usual_layout(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = trained.job()
    last = job.model_copy(update={"train": job.train.model_copy(update={"channels_last": True})})
    monkeypatch.setattr(Run, "job", lambda self: last)
    assert not trained.load_model()._forward_pre_hooks  # and of a model without convolutions, it could not be built


def test_what_cannot_be_loaded_is_said(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"has no checkpoint '15'; it has steps \[10, 20, 30, 40\]"):
        trained.load_model(15)
    with pytest.raises(JobError, match="is no run: it has no config.yaml"):
        Run(str(tmp_path)).load_model()
    assert Run(str(tmp_path)).status() is None
    assert Run(str(tmp_path)).metrics.read() == []
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    with pytest.raises(JobError, match=r"config\.yaml is damaged"):
        Run(str(tmp_path)).load_model()


def test_a_checkpoint_of_another_model_is_not_loaded(trained: Run) -> None:
    with pytest.raises(RunError, match="is of another model: .* differ"):
        export.load(trained.checkpoints, 40, nn.Linear(2, 2))


def state_of(seed: int) -> Any:
    """A state as somebody's own loop has it: no more than the three things that are needed."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters()), step=0)


def test_a_checkpointer_serves_a_plain_loop(tmp_path: Path) -> None:
    states = [state_of(0), state_of(1)]
    for state in states:
        checkpointer = Checkpointer(f"{tmp_path}/checkpoints")
        start = checkpointer.resume(state, say=lambda words: None)
        assert state.step == (start or 0)
        for _ in range(5):
            state.model(torch.ones(4, 3)).sum().backward()
            state.optimizer.step()
            state.step += 1
        checkpointer.save(state)
        checkpointer.wait()
        assert checkpointer.failure is None
    assert [state.step for state in states] == [5, 10]
    found = state_of(2)
    assert Checkpointer(f"{tmp_path}/checkpoints").resume(found) == 10
    for state in (found, states[1]):
        state.all = [*state.model.parameters(), *state.optimizer.state[state.model.weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(found.all, states[1].all, strict=True))


def test_a_trainer_takes_any_optimizer_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(model, Classification(), optimizer, lambda step: 1 / (step + 1), device=torch.device("cpu"),
                      total_steps=3, global_batch_size=4)  # fmt: skip
    batch = Batch(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), np.arange(4))
    trainer.fit([[batch]] * 3)
    assert trainer.finished
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 3)


def test_launch_and_train_give_the_same_weights(workplace: Workplace, equal: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    settings = ["train.device=cpu", "train.max_steps=10"]
    launched = toolkit.launch("digits.yaml", *settings, "run.dir=runs/launched", processes=1)
    toolkit.train(load_job("digits.yaml", [*settings, "run.dir=runs/trained"]))
    assert type(launched) is Run
    assert launched.checkpoints.newest() == 10
    assert equal(workplace.tensors("runs/launched", 10), workplace.tensors("runs/trained", 10))
