"""The composition root: a job becomes parts, the parts become a run.

The only module that knows both the job file and the loop.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from toolkit import components, datasets, diagnosis, distributed, ending, optim, persistence, sharding, storage, world
from toolkit.agreement import Agreement
from toolkit.config import Fraction, Job
from toolkit.config.text import dump
from toolkit.datasets.loader import EvaluationSteps, TrainingSteps, batches, check_workers
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.split import held_out
from toolkit.datasets.transforms import TRANSFORMS
from toolkit.distributed import ALONE, Ranks
from toolkit.ending import PLAIN, Result
from toolkit.layout import placed
from toolkit.lost import Guard
from toolkit.models import MODELS
from toolkit.observers.averaging import Averaging
from toolkit.observers.beat import Beat
from toolkit.observers.checkpoints import Checkpoints
from toolkit.observers.evaluation import Batches, Evaluation
from toolkit.observers.heartbeat import Heartbeat
from toolkit.observers.metrics import Metrics
from toolkit.observers.progress import ProgressBar
from toolkit.observers.samples import recorded
from toolkit.observers.stragglers import Stragglers
from toolkit.randomness import derive, seed_everything
from toolkit.run import CANCEL, COMPLETE, STOP, Run
from toolkit.signals import StopSignals
from toolkit.tasks import TASKS
from toolkit.trainer import Observer, Trainer


@dataclass(frozen=True)
class Parts:
    """A job's parts, built and tried, with nothing written yet."""

    trainer: Trainer
    steps: TrainingSteps
    val: EvaluationSteps | None
    test: EvaluationSteps | None
    resolved: dict[str, Any]  # what `auto` means here, where it changes what is learnt

    @property
    def data(self) -> dict[str, Any]:
        """What is known of the training set."""
        return datasets.facts(self.steps.dataset, self.steps.sampler.size)

    def epoch_of(self, step: int) -> int:
        """The epoch that the stream is in after so many steps."""
        return step * self.steps.sampler.global_batch_size // self.steps.sampler.size

    def evaluates_after(self, job: Job, step: int) -> bool:
        """Whether a job looks at its validation set after this step: at the first in each epoch whose turn it is."""
        if job.eval.every_steps:
            return step % job.eval.every_steps == 0
        every = job.eval.every_epochs or 1
        return self.epoch_of(step) // every > self.epoch_of(step - 1) // every


def train(job: Job, ranks: Ranks = ALONE, console: Console | None = None, command: Sequence[str] = ()) -> Result:
    """Start or resume the run of a job on this rank, in this very process, to its end or to an agreed stop.

    It goes on from its newest checkpoint, and takes the steps that it would have taken; a run that is complete is left
    as it is. The result's `state` tells `completed` from `preempted`: then a signal has stopped it, with all saved.
    Call it in the main thread; its signal handlers are there only meanwhile. Raises JobError before anything is
    written, RunError if training fails.
    """
    console = console or Console(quiet=True)
    with StopSignals().listening() as signals:
        device = distributed.choose_device(job.train.device, ranks)
        distributed.join(ranks, device, job.launch.limits.longest_s)
        machine = world.meet()
        run = Run(job.run.dir)
        if done := distributed.from_rank_0(lambda: run.completed(job.as_written())):
            console.print(done["summary"], COMPLETE, **PLAIN)
            return Result("completed", run.url, done["step"], done["metrics"])
        parts = build(job, ranks, device)
        world.see_the_same(parts.data)
        _rehearse(parts)
        attempt = distributed.from_rank_0(lambda: _open(run, job, parts, machine, command, console))
        with settled():
            return _trained(run, job, parts, attempt, machine, signals, console)


def build(job: Job, ranks: Ranks, device: torch.device) -> Parts:
    """Every part of the job, checked against the others. Raises JobError; writes nothing."""
    job.check_ranks(ranks.world_size)
    data = datasets.build("data.train", job.data.train)
    shapes = datasets.shapes(data)
    test = datasets.build("data.test", job.data.test, data) if job.data.test else None
    val: Any = None
    if isinstance(job.data.val, Fraction):
        data, val = held_out(data, job.data.val.fraction, job.run.seed)
    elif job.data.val:
        val = datasets.build("data.val", job.data.val, data)
    transforms = [components.build("data.transforms", transform, TRANSFORMS) for transform in job.data.transforms]
    sampler = ElasticDistributedSampler(
        data, ranks.world_size, ranks.rank, seed=job.run.seed, global_batch_size=job.data.global_batch_size
    )
    micro_batch_size = None if job.train.micro_batch_size == "auto" else job.train.micro_batch_size
    steps = TrainingSteps(data, sampler, micro_batch_size, transforms, in_step=job.train.in_step)
    trainer = _trainer(job, ranks, device, shapes, sampler)
    resolved = {"train.precision": distributed.choose_precision(job.train.precision, device)}
    return Parts(trainer, steps, _evaluated(job, val, steps, ranks), _evaluated(job, test, steps, ranks), resolved)


def _trainer(
    job: Job, ranks: Ranks, device: torch.device, shapes: dict[str, Any], sampler: ElasticDistributedSampler
) -> Trainer:
    model = model_of(job, ranks, device, shapes)
    total_steps = _total_steps(job, sampler)
    return Trainer(
        model,
        components.build("task", job.task, TASKS),
        optim.build_optimizer(model, job.optimizer, device, job.optimizer.lr_scale),
        optim.build_schedule(job.schedule, total_steps),
        device=device,
        total_steps=total_steps,
        global_batch_size=job.data.global_batch_size,
        ranks=ranks,
        seed=job.run.seed,
        precision=distributed.choose_precision(job.train.precision, device),
        clip_grad_norm=job.train.clip_grad_norm,
        ema=optim.Ema(model, job.train.ema_decay) if job.train.ema_decay else None,
        eval_precision=job.eval.precision and distributed.choose_precision(job.eval.precision, device),
        guard=Guard(job.train.on_nan, job.train.spike_grad_norm, sampler.batch_number),
        grad_compression=job.train.grad_compression,
    )


def _total_steps(job: Job, sampler: ElasticDistributedSampler) -> int:
    by_epochs = sampler.first_step(job.train.epochs) if job.train.epochs else float("inf")
    return int(min(by_epochs, job.train.max_steps or float("inf")))


def model_of(job: Job, ranks: Ranks, device: torch.device, shapes: dict[str, Any]) -> nn.Module:
    """The job's model, whole or as this rank's share. `shapes` are what the dataset knows: see `datasets.shapes`."""

    def make() -> nn.Module:
        seed_everything(derive(job.run.seed))  # the same weights on every rank, on any machine
        model: nn.Module = components.build("model", job.model, MODELS, offers=shapes)
        if job.train.sync_batch_norm:
            model = sharding.with_sync_batch_norm(model, device, ranks.world_size)
        optim.freeze(model, job.train.freeze)
        return model

    if job.train.strategy == "fsdp" and ranks.world_size > 1:
        names = (job.train.precision, job.eval.precision or job.train.precision)
        model = sharding.build(make, job.model.name, device, *(distributed.choose_precision(n, device) for n in names))
    else:
        model = placed(make(), device, job.train.channels_last)
    if job.train.activation_checkpointing:
        sharding.recompute(model, job.train.compile)
    if job.train.compile:
        model.compile()
    return model


def _evaluated(job: Job, dataset: Any, steps: TrainingSteps, ranks: Ranks) -> EvaluationSteps | None:
    if dataset is None:
        return None
    size = steps.micro_batch_size if job.eval.batch_size == "auto" else job.eval.batch_size
    return EvaluationSteps(dataset, size, ranks.rank, ranks.world_size, steps.transforms)


def whole(share: EvaluationSteps | None, job: Job, device: torch.device) -> Batches | None:
    """This rank's batches of a whole set, anew at each call."""
    return None if share is None else lambda: batches(share, 0, len(share), job.data.workers, device)


def _rehearse(parts: Parts) -> None:
    """Try the first step and throw it away. What fails here fails before anything is written."""
    try:
        (first,) = batches(parts.steps, 0, 1, 0, parts.trainer.device)
        parts.trainer.rehearse(first)
    except Exception as error:
        raise diagnosis.refusal(error, parts.trainer, parts.steps) from error


@contextmanager
def settled() -> Iterator[None]:
    """Inside, Python looks for no garbage among what was there before: torch alone has a quarter of a million objects,
    and to look through them takes 0.1 s, now and then, in the middle of a step or of a save.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _open(run: Run, job: Job, parts: Parts, machine: dict[str, Any], command: Sequence[str], console: Console) -> int:
    """Take the lock and write the job down. Returns the number of this attempt."""
    written, before, say = job.as_written(), run.status() or {}, _to(console)
    run.refuse_drift(written, parts.resolved, parts.data)
    persistence.check_beginning(run, job, parts.trainer)
    evaluations = [share for share in (parts.val, parts.test) if share]
    check_workers(parts.steps, evaluations, job.data.workers, machine["hosts"].count(machine["host"]))
    attempt = run.open(dump(written), written, parts.resolved, command, machine, say, parts.data)
    ending.silent(run, before, machine, say)
    return attempt


def _trained(
    run: Run, job: Job, parts: Parts, attempt: int, machine: dict[str, Any], signals: StopSignals, console: Console
) -> Result:
    trainer, say = parts.trainer, _to(console)
    saves = persistence.checkpoints(run, job, trainer, attempt, parts.resolved, say)
    try:
        persistence.begin(run, job, trainer, saves, say)
        _announce(run, job, parts, console)
        observers, fitted = _observers(run, job, parts, saves, machine["hosts"], console), False
        while not fitted:  # again after each rollback
            with persistence.rolling_back(run, job, trainer, saves, say), _remaining(run, job, parts, attempt) as feed:
                trainer.fit(feed, observers, Agreement(trainer.ranks, _wishes(run, saves, signals)))
                fitted = True
        return ending.ended(run, job.run.name, trainer, parts.epoch_of, bool(parts.val or parts.test), signals, console)
    except Exception as error:
        cause = diagnosis.explained(error, trainer, parts.steps, filter(None, (parts.val, parts.test)))
        ending.failed(run, trainer, attempt, cause)
        raise cause from error
    finally:
        run.close()


def _wishes(run: Run, saves: Checkpoints, signals: StopSignals) -> dict[str, Callable[[], bool]]:
    """What this rank may wish for after a step, and all ranks then agree on."""
    return {"stop": lambda: signals.wanted() or saves.broken() or run.wished(STOP, CANCEL), "save": saves.wanted}


@contextmanager
def _remaining(run: Run, job: Job, parts: Parts, attempt: int) -> Iterator[Iterable[Any]]:
    """The batches of every step that is still to be taken, without those that are skipped; ended with the context."""
    trainer = parts.trainer
    parts.steps.skip(trainer.state.skipped)
    steps = batches(parts.steps, trainer.state.step, trainer.total_steps, job.data.workers, trainer.device)
    with closing(steps), closing(recorded(steps, run, attempt, trainer)) as recording:
        yield recording if job.log.samples else steps


def _observers(
    run: Run, job: Job, parts: Parts, saves: Checkpoints, hosts: Sequence[str], console: Console
) -> list[Observer]:
    """In the order in which they act after a step: a line of metrics must be written before the checkpoint that vouches
    for it.
    """
    device = parts.trainer.device
    averaging = [Averaging()] if parts.trainer.state.ema else []

    def reported(step: int) -> list[str]:
        names: list[str] = distributed.from_rank_0(lambda: run.metrics.names_at(step))
        return names

    val, test = whole(parts.val, job, device), whole(parts.test, job, device)
    evaluation = Evaluation(partial(parts.evaluates_after, job), val, test, reported)
    progress, leads = ProgressBar(console), parts.trainer.ranks.leads
    sinks = [run.metrics.append, progress.show] if leads else []
    amend = run.metrics.open if leads else lambda step, values: None
    stragglers = Stragglers(hosts, _to(console))

    def counts() -> dict[str, float]:
        return saves.counts() | stragglers.counts()

    metrics = Metrics(job.log.every_steps, parts.epoch_of, sinks, job.checkpoint.every_steps, counts, amend)
    heartbeat = Heartbeat(run, parts.epoch_of, saves.checkpointer, _to(console))
    told: list[Observer] = [heartbeat, progress] if leads else []
    return [*averaging, evaluation, metrics, saves, *told, Beat(), stragglers]


def _to(console: Console) -> Callable[[str], None]:
    return lambda words: console.print(words, **PLAIN)


def _announce(run: Run, job: Job, parts: Parts, console: Console) -> None:
    trainer, sampler = parts.trainer, parts.steps.sampler
    parameters = sum(parameter.numel() for parameter in trainer.state.model.parameters())
    ranks = f"{trainer.ranks.world_size} rank{'s' if trainer.ranks.world_size > 1 else ''}"
    start = f"resuming at step {trainer.state.step}" if trainer.state.step else "starting"
    console.print(
        f"{job.run.name}: {start} in {storage.shown(run.url)}\n"
        f"{parameters} parameters, {sampler.size} training samples, {trainer.total_steps} "
        f"steps of {sampler.global_batch_size}, {ranks} on {trainer.device}",
        **PLAIN,
    )
