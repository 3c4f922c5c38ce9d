"""How a run lasts: where its checkpoints are, when they are written, and where a start of it begins."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from toolkit import optim, storage
from toolkit.checkpoint import Archive, Checkpointer, Policy, export
from toolkit.config import Job
from toolkit.errors import JobError, RunError
from toolkit.observers.checkpoints import Checkpoints
from toolkit.run import SAVE_NOW, Run, digest
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


def check_origin(run: Run, job: Job, trainer: Trainer) -> None:
    """Raises JobError if a new run is to begin with weights that are not there, or of which none fits."""
    if job.run.init_from and not Archive(run.at("checkpoints")).folders():
        export.fit(job.run.init_from, trainer.state.model)


def begin(run: Run, job: Job, trainer: Trainer, saves: Checkpoints, say: Say) -> None:
    """Go to the newest checkpoint, which rank 0 finds, and cut off the metrics of a past that is no more.

    A run that begins with weights from elsewhere saves them at once, and never needs the other run again.
    """
    state = trainer.state
    resumed = saves.checkpointer.resume(state, say)
    if trainer.ranks.leads:
        run.metrics.open(last_step=state.step)
    if resumed is None and job.run.init_from:
        weights = export.fit(job.run.init_from, state.model)
        weights.load(state.model)
        if state.ema:
            state.ema = optim.Ema(state.model, state.ema.decay)
        say(weights.words())
        saves.save_first(trainer)
