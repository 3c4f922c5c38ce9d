"""The composition root: a job becomes parts, the parts become a run.

The only module that knows both the job file and the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from toolkit import components, datasets, diagnosis, distributed, optim, storage
from toolkit.checkpoint import Checkpointer
from toolkit.config import Fraction, Job
from toolkit.config.text import dump
from toolkit.datasets.loader import EvaluationSteps, TrainingSteps, batches
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.split import held_out
from toolkit.datasets.transforms import TRANSFORMS
from toolkit.distributed import ALONE, Agreement, Ranks
from toolkit.errors import JobError, RunError
from toolkit.models import MODELS
from toolkit.observers.checkpoints import Checkpoints
from toolkit.observers.evaluation import Batches, Evaluation
from toolkit.observers.heartbeat import Heartbeat
from toolkit.observers.metrics import Metrics
from toolkit.observers.progress import ProgressBar
from toolkit.randomness import derive, seed_everything
from toolkit.run import COMPLETE, Run
from toolkit.signals import StopSignals
from toolkit.tasks import TASKS
from toolkit.trainer import Observer, Trainer

_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "sep": "\n"}


@dataclass(frozen=True)
class Result:
    """How a start of a run ended: `completed`, or `preempted` with everything saved."""

    state: str
    url: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """A job's parts, built and tried, with nothing written yet."""

    trainer: Trainer
    steps: TrainingSteps
    val: EvaluationSteps | None
    test: EvaluationSteps | None


def train(job: Job, ranks: Ranks = ALONE, console: Console | None = None, command: Sequence[str] = ()) -> Result:
    """Start or resume the run of a job on this rank, to its end or to an agreed stop.

    Raises JobError before anything is written.
    """
    console = console or Console(quiet=True)
    signals = StopSignals().listen()
    device = distributed.choose_device(job.train.device, ranks)
    distributed.join(ranks, device)
    run = Run(job.run.dir)
    if done := distributed.from_rank_0(lambda: run.completed(job.as_written())):
        console.print(done["summary"], COMPLETE, **_PLAIN)
        return Result("completed", run.url, done["step"], done["metrics"])
    parts = build(job, ranks, device)
    _rehearse(parts)
    distributed.from_rank_0(lambda: _open(run, job, command))
    return _trained(run, job, parts, signals, console)


def build(job: Job, ranks: Ranks, device: torch.device) -> Parts:
    """Every part of the job, checked against the others. Raises JobError; writes nothing."""
    job.check_ranks(ranks.world_size)
    data = datasets.build("data.train", job.data.train)
    shapes = datasets.shapes(data)
    val: Any = None
    if isinstance(job.data.val, Fraction):
        data, val = held_out(data, job.data.val.fraction, job.run.seed)
    elif job.data.val:
        val = datasets.build("data.val", job.data.val)
    test = datasets.build("data.test", job.data.test) if job.data.test else None
    transforms = [components.build("data.transforms", transform, TRANSFORMS) for transform in job.data.transforms]
    sampler = ElasticDistributedSampler(
        data, ranks.world_size, ranks.rank, seed=job.run.seed, global_batch_size=job.data.global_batch_size
    )
    micro_batch_size = None if job.train.micro_batch_size == "auto" else job.train.micro_batch_size
    steps = TrainingSteps(data, sampler, micro_batch_size, transforms)
    trainer = _trainer(job, ranks, device, shapes, sampler)
    return Parts(trainer, steps, _evaluated(job, val, steps, ranks), _evaluated(job, test, steps, ranks))


def _trainer(
    job: Job, ranks: Ranks, device: torch.device, shapes: dict[str, Any], sampler: ElasticDistributedSampler
) -> Trainer:
    seed_everything(derive(job.run.seed))  # the same weights on every rank, on any machine
    model = components.build("model", job.model, MODELS, offers=shapes).to(device)
    if job.train.compile:
        model.compile()
    by_epochs = sampler.first_step(job.train.epochs) if job.train.epochs else float("inf")
    total_steps = int(min(by_epochs, job.train.max_steps or float("inf")))
    return Trainer(
        model,
        components.build("task", job.task, TASKS),
        optim.build_optimizer(model, job.optimizer, device),
        optim.build_schedule(job.schedule, total_steps),
        device=device,
        total_steps=total_steps,
        global_batch_size=job.data.global_batch_size,
        ranks=ranks,
        seed=job.run.seed,
        precision=distributed.choose_precision(job.train.precision, device),
        clip_grad_norm=job.train.clip_grad_norm,
    )


def _evaluated(job: Job, dataset: Any, steps: TrainingSteps, ranks: Ranks) -> EvaluationSteps | None:
    if dataset is None:
        return None
    size = steps.micro_batch_size if job.eval.batch_size == "auto" else job.eval.batch_size
    return EvaluationSteps(dataset, size, ranks.rank, ranks.world_size, steps.transforms)


def _whole(share: EvaluationSteps | None, job: Job, device: torch.device) -> Batches | None:
    """This rank's batches of a whole set, anew at each call."""
    return None if share is None else lambda: batches(share, 0, len(share), job.data.workers, device)


def _rehearse(parts: Parts) -> None:
    """Try the first step and throw it away. What fails here fails before anything is written."""
    trainer, steps = parts.trainer, parts.steps
    try:
        (first,) = batches(steps, 0, 1, 0, trainer.device)
        trainer.rehearse(first)
    except Exception as error:
        cause = diagnosis.explained(error, trainer, steps)
        if cause is not error or isinstance(error, RunError):
            raise cause from error
        raise JobError(f"model, data and task do not fit together: {type(error).__name__}: {error}") from error


def _open(run: Run, job: Job, command: Sequence[str]) -> None:
    written = job.as_written()
    run.open(dump(written), written, command, distributed.describe())


def _trained(run: Run, job: Job, parts: Parts, signals: StopSignals, console: Console) -> Result:
    trainer, state, leads = parts.trainer, parts.trainer.state, parts.trainer.ranks.leads
    saves = _saves(run, job, leads)
    try:
        _resume(run, saves.checkpointer, trainer)
        _announce(run, job, parts, console)
        agreement = Agreement(trainer.ranks, {"stop": signals.wanted, "save": saves.overdue})
        remaining = batches(parts.steps, state.step, trainer.total_steps, job.data.workers, trainer.device)
        trainer.fit(remaining, _observers(run, job, parts, saves, console), agreement)
    except Exception as error:
        cause = diagnosis.explained(error, trainer, parts.steps, filter(None, (parts.val, parts.test)))
        if leads:
            run.set_status("failed", step=state.step, reason=str(cause), exit=1)
        raise cause from error
    finally:
        run.metrics.close()
    return _ended(run, job, parts, signals, console)


def _resume(run: Run, checkpointer: Checkpointer, trainer: Trainer) -> None:
    """Go to the newest checkpoint, which rank 0 finds, and cut off the metrics of a past that is no more."""
    newest = distributed.from_rank_0(checkpointer.newest)
    if newest is not None:
        checkpointer.load(newest, trainer.state)
    if trainer.ranks.leads:
        run.metrics.open(last_step=trainer.state.step)


def _checkpointer(url: str, job: Job) -> Checkpointer:
    mode = job.checkpoint.best.mode if job.checkpoint.best else "max"
    return Checkpointer(storage.join(url, "checkpoints"), job.checkpoint.keep, mode)


def _saves(run: Run, job: Job, leads: bool) -> Checkpoints:
    policy = job.checkpoint
    metric = policy.best.metric if policy.best else None
    checkpointer = _checkpointer(run.url, job)
    return Checkpoints(checkpointer, policy.every_steps, policy.every_min, metric, leads, first=run.metrics.upload)


def _observers(run: Run, job: Job, parts: Parts, saves: Checkpoints, console: Console) -> list[Observer]:
    """In the order in which they act after a step: a line of metrics must be written before the checkpoint that vouches
    for it.
    """
    steps_per_epoch = parts.steps.sampler.size / job.data.global_batch_size
    every_steps, every_epochs = job.eval.every_steps, job.eval.every_epochs or 1

    def due(step: int) -> bool:
        if every_steps:
            return step % every_steps == 0
        return int(step / steps_per_epoch / every_epochs) > int((step - 1) / steps_per_epoch / every_epochs)

    device = parts.trainer.device
    evaluation = Evaluation(due, _whole(parts.val, job, device), _whole(parts.test, job, device))
    if not parts.trainer.ranks.leads:
        return [evaluation, Metrics(job.log.every_steps, steps_per_epoch, [], job.checkpoint.every_steps), saves]
    progress = ProgressBar(console)
    sinks = [run.metrics.append, progress.show]
    metrics = Metrics(job.log.every_steps, steps_per_epoch, sinks, job.checkpoint.every_steps)
    return [evaluation, metrics, saves, Heartbeat(run, steps_per_epoch), progress]


def _ended(run: Run, job: Job, parts: Parts, signals: StopSignals, console: Console) -> Result:
    """Say how it ended, in status.json and on the console."""
    trainer, step = parts.trainer, parts.trainer.state.step
    state, exit_status, reason = "completed", 0, None
    if not trainer.finished:
        state, exit_status = "preempted", 75
        reason = f"stopped by {signals.received.name}" if signals.received else "another rank was asked to stop"
    metrics: dict[str, float] = {}
    if trainer.ranks.leads:
        lines = [line for line in run.metrics.read() if line["step"] == step]
        metrics = {name: value for line in lines for name, value in line.items() if name.startswith(("val/", "test/"))}
        found = "".join(f"  {name} {value:.4f}" for name, value in sorted(metrics.items()))
        summary = f"{job.run.name}: {state} at step {step} of {trainer.total_steps}{found}\nrun directory: {run.url}"
        epoch = step * job.data.global_batch_size // parts.steps.sampler.size
        progress: dict[str, Any] = {"step": step, "total": trainer.total_steps, "epoch": epoch}
        run.set_status(state, **progress, reason=reason, exit=exit_status, metrics=metrics, summary=summary)
        console.print(summary, **_PLAIN)
        if not trainer.finished:
            console.print("Everything is saved; the same command goes on from here.", **_PLAIN)
    distributed.leave()
    return Result(state, run.url, step, metrics)


def _announce(run: Run, job: Job, parts: Parts, console: Console) -> None:
    trainer, sampler = parts.trainer, parts.steps.sampler
    parameters = sum(parameter.numel() for parameter in trainer.state.model.parameters())
    ranks = f"{trainer.ranks.world_size} rank{'s' if trainer.ranks.world_size > 1 else ''}"
    start = f"resuming at step {trainer.state.step}" if trainer.state.step else "starting"
    console.print(
        f"{job.run.name}: {start} in {run.url}\n"
        f"{parameters} parameters, {sampler.size} training samples, {trainer.total_steps} "
        f"steps of {sampler.global_batch_size}, "
        f"{ranks} on {trainer.device}",
        **_PLAIN,
    )


def evaluate(job: Job, url: str, which: str = "last", split: str = "test") -> dict[str, float]:
    """Exact metrics of one checkpoint of a run: `best`, `last` or a step; on `val` or `test`."""
    if split not in ("val", "test"):
        raise JobError(f"--split is {split!r}; it must be val or test")
    device = distributed.choose_device(job.train.device, ALONE)
    parts = build(job, ALONE, device)
    batches_of = _whole(parts.val if split == "val" else parts.test, job, device)
    if batches_of is None:
        raise JobError(f"the job of {url} has no data.{split}; use --split {'test' if split == 'val' else 'val'}")
    checkpointer = _checkpointer(url, job)
    step = {"last": checkpointer.newest, "best": checkpointer.best}.get(
        which, lambda: int(which) if which.isdigit() else None
    )()
    if step not in checkpointer.steps():
        raise JobError(f"{url} has no checkpoint {which!r}; it has steps {checkpointer.steps()}")
    checkpointer.load(step, parts.trainer.state)
    return {f"{split}/{name}": value for name, value in parts.trainer.evaluate(batches_of()).items()} | {"step": step}
