"""A new run from a checkpoint of another, with a changed job."""

from collections.abc import Mapping, Sequence

from toolkit import storage
from toolkit.checkpoint import Archive
from toolkit.checkpoint.manifest import NAME
from toolkit.config import job_from_text
from toolkit.config.text import dump, quoted
from toolkit.drift import changed, digest
from toolkit.errors import JobError
from toolkit.persistence import step_of
from toolkit.run import Run, fresh_url

# What shapes the state itself: with another of these the checkpoint cannot be gone on from.
SHAPES = ("model.", "optimizer.name", "train.freeze", "train.ema_decay", "train.precision")


def fork(url: str, which: str, changes: Sequence[str], environment: Mapping[str, str]) -> str:
    """Copy a checkpoint, verified, and the metrics up to it into a new run directory with the changed job.

    Returns words for the user. Raises JobError, with nothing written, if the job cannot go on from it.
    """
    text_url = storage.join(url, "config.yaml")
    try:
        text = storage.read(text_url).decode()
    except OSError:
        raise JobError(f"{storage.shown(url)} is no run: it has no config.yaml; give the directory of a run") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{storage.shown(text_url)} is damaged: {error}; fork another run") from None
    where = storage.shown(text_url)
    if not any(change.startswith("run.dir=") for change in changes):
        home, free = job_from_text(text, where, changes, environment), fresh_url(url.rstrip("/") + "-fork")
        beside = free.startswith(home.run.dir.rstrip("/"))
        changes = [*changes, home.moved_to(free) if beside else f"run.dir={quoted(free)}"]
    job = job_from_text(text, where, changes, environment)
    old, new, target = Run(url), job.as_written(), Run(job.run.dir)
    if storage.names(target.url):
        raise JobError(f"run.dir {storage.shown(target.url)} is not empty; choose another run.dir")
    provenance = old.provenance()
    if "job" not in provenance:
        raise JobError(
            f"{storage.shown(url)} has never been started, and has no checkpoint to go on from; train it first"
        )
    lines = changed(provenance["job"], new)
    shaped = [line for line in lines if line.startswith(SHAPES)]
    if shaped:
        raise JobError(
            "a checkpoint does not fit a job with another\n" + "\n".join(f"  {line}" for line in shaped) +
            f"\ntake only its weights: run.init_from={storage.shown(url)} in a job of its own"
        )  # fmt: skip
    archive = Archive(old.at("checkpoints"))
    step = step_of(archive, which)
    resolved = provenance.get("resolved", {})
    _copy(archive, step, target, digest(new, resolved))
    target.begin_from(old, step, dump(new), new)
    name = "\n".join(f"  {line}" for line in lines) or "  nothing"
    where = storage.shown(target.url)
    return f"{where} begins at step {step} of {storage.shown(url)}; changed:\n{name}\ntoolkit train {where}/config.yaml"


def _copy(archive: Archive, step: int, target: Run, config_digest: str) -> None:
    """Every byte of a checkpoint is checked, then copied; the manifest, with the new job's digest, comes last."""
    manifest = archive.verify(step)
    folder = target.at("checkpoints", f"step-{step:08d}")
    for name in manifest.files:
        storage.write(storage.join(folder, name), storage.read(storage.join(archive.folder(step), name)))
    copy = manifest.model_copy(update={"config_digest": config_digest, "attempt": 0})
    storage.write(storage.join(folder, NAME), copy.encoded())
