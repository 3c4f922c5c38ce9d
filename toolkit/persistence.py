"""How a run lasts: where its checkpoints are, when they are written, and where a start of it begins."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from toolkit import distributed, optim, pulse, storage
from toolkit.checkpoint import Archive, Checkpointer, Policy, export
from toolkit.checkpoint.state import to_plain
from toolkit.config import Job
from toolkit.drift import digest
from toolkit.errors import JobError, RunError
from toolkit.lost import Lost, LostLossError
from toolkit.observers.checkpoints import Checkpoints
from toolkit.run import SAVE_NOW, Run
from toolkit.trainer import Trainer

Say = Callable[[str], None]


def archive_of(url: str, job: Job, config_digest: str = "") -> Archive:
    """The checkpoints of a run, kept as its job says."""
    best = job.checkpoint.best
    policy = Policy(job.checkpoint.keep, best.mode if best else "max", job.checkpoint.keep_every)
    return Archive(storage.join(url, "checkpoints"), policy, config_digest)


def step_of(archive: Archive, which: str) -> int:
    """The step that the user means by `best`, `last` or a number. Raises JobError that lists what there is."""
    try:
        return archive.find(which)
    except RunError as error:
        raise JobError(str(error)) from error


def checkpoints(
    run: Run, job: Job, trainer: Trainer, attempt: int, resolved: Mapping[str, Any], say: Say
) -> Checkpoints:
    """The observer that saves. A checkpoint never knows of more than the metrics beside it do."""

    def before_commit() -> None:
        if run.lock:
            run.lock.check()  # or the remote copy of the metrics is another's
        run.metrics.upload()
        if run.wished(SAVE_NOW):
            run.granted(SAVE_NOW)

    checkpointer = Checkpointer(
        archive_of(run.url, job, digest(job.as_written(), resolved)),
        trainer.ranks,
        attempt,
        job.data.global_batch_size,
        check_lock=run.lock.check if run.lock else lambda: None,
    )
    policy = job.checkpoint
    metric = policy.best.metric if policy.best else None
    asked = partial(run.wished, SAVE_NOW)
    return Checkpoints(
        checkpointer, policy.every_steps, policy.every_min, metric, policy.on_error, asked, before_commit, say
    )


def check_beginning(run: Run, job: Job, trainer: Trainer) -> None:
    """Raises JobError if a run is beyond its job's last step, if its state cannot be saved, or if a new one is to begin
    with weights that are not there, or do not fit.
    """
    archive = Archive(run.at("checkpoints"))
    try:
        to_plain(trainer.state)
    except RunError as error:
        raise JobError(str(error)) from error
    _refuse_beyond(run, archive.newest() or 0, trainer.total_steps)
    if job.run.init_from and not archive.folders():
        export.fit(job.run.init_from, trainer.state.model, job.run.init_except)


def _refuse_beyond(run: Run, step: int, total_steps: int) -> None:
    if step > total_steps:
        where = storage.shown(run.url)
        raise JobError(
            f"{where} is at step {step}, and the job ends at step {total_steps}: raise train.epochs or train.max_steps;"
            f" or go on from one of its earlier checkpoints in a new run: toolkit fork {where} --at STEP KEY=VALUE; or "
            "start over with --fresh"
        )


def begin(run: Run, job: Job, trainer: Trainer, saves: Checkpoints, say: Say) -> None:
    """Go to the newest checkpoint, which rank 0 finds, and cut off the metrics of a past that is no more.

    A run that begins with weights from elsewhere saves them at once, and never needs the other run again; so does one
    that may have to come back here.
    """
    state = trainer.state
    resumed = saves.checkpointer.resume(state, say)
    _refuse_beyond(run, state.step, trainer.total_steps)  # again: another may have trained here before we had the lock
    if trainer.ranks.leads:
        run.metrics.open(last_step=state.step)
    if resumed is None and job.run.init_from:
        weights = export.fit(job.run.init_from, state.model, job.run.init_except, distributed.from_rank_0)
        weights.load(state.model)
        if state.ema:
            state.ema = optim.Ema(state.model, state.ema.decay)
        say(weights.words())
    if resumed is None and (job.run.init_from or job.train.on_nan == "rollback"):
        saves.save_first(trainer)


@contextmanager
def rolling_back(run: Run, job: Job, trainer: Trainer, saves: Checkpoints, say: Say) -> Iterator[None]:
    """Where a step in here is lost and the job says rollback, the run is at its newest checkpoint afterwards, and
    `state.skipped` has the batch of that step. Raises LostLossError once `train.max_rollbacks` have been left out, and
    where the job says something else. A save in flight is waited for in any case.
    """
    try:
        yield
    except LostLossError as error:  # on all ranks together
        try:
            _finish(saves)
        except (RunError, JobError, OSError) as other:
            say(f"WARNING: {other}")
            raise error from other
        if job.train.on_nan != "rollback" or error.lost is None:
            raise
        if len(trainer.state.skipped) >= job.train.max_rollbacks:
            most = f"train.max_rollbacks is {job.train.max_rollbacks}, and as many batches have been left out"
            raise LostLossError(f"{error}; {most}", error.steps, error.lost) from error
        _roll_back(run, trainer, saves, error.lost, say)
        count = f"rollback {len(trainer.state.skipped)} of {job.train.max_rollbacks}"
        say(f"WARNING: {error}: rolled back to step {trainer.state.step}, and on without them ({count})")


def _finish(saves: Checkpoints) -> None:
    """Wait for a save in flight, all ranks together: one that leaves in words takes its part of it along."""
    phase = pulse.last().phase
    pulse.beat("save")
    distributed.from_rank_0(saves.checkpointer.wait)  # which ends last, with the manifest
    pulse.beat(phase)  # that in which the step was lost


def _roll_back(run: Run, trainer: Trainer, saves: Checkpoints, lost: Lost, say: Say) -> None:
    """Every rank has found the same step lost, after the same step: see `Interval.mean`."""
    pulse.beat("start")
    state, skipped = trainer.state, sorted([*trainer.state.skipped, lost.batch])
    saves.checkpointer.wait()
    if saves.checkpointer.resume(state, say) is None:
        where = storage.shown(run.at("checkpoints"))
        raise RunError(f"{lost.why}, and {where} has no checkpoint any more to go back to; use --fresh")
    state.skipped = skipped  # a checkpoint knows of those from before it
    events = [*trainer.interval.events, lost.event("rollback", to=state.step)]
    if trainer.ranks.leads:
        cut = [event for line in run.metrics.read() if line["step"] > state.step for event in line.get("events", [])]
        events = [event for event in cut if event["event"] == "rollback"] + events
        run.metrics.open(last_step=state.step)
    trainer.report = {}
    trainer.interval.restart()
    trainer.interval.events = events
