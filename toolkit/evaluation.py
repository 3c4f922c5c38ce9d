"""`toolkit evaluate`: the metrics of one checkpoint of a run, on this machine alone."""

from toolkit import distributed, persistence, session, storage
from toolkit.config import Job
from toolkit.distributed import ALONE
from toolkit.errors import JobError


def evaluate(job: Job, url: str, which: str = "last", split: str = "test") -> dict[str, float]:
    """Exact metrics of one checkpoint of a run: `best`, `last` or a step; on `val` or `test`."""
    if split not in ("val", "test"):
        raise JobError(f"--split is {split!r}; it must be val or test")
    device = distributed.choose_device(job.train.device, ALONE)
    parts = session.build(job, ALONE, device)
    batches_of = session.whole(parts.val if split == "val" else parts.test, job, device)
    if batches_of is None:
        raise JobError(
            f"the job of {storage.shown(url)} has no data.{split}; use --split {'test' if split == 'val' else 'val'}"
        )
    archive = persistence.archive_of(url, job)
    step = persistence.step_of(archive, which)
    archive.load(step, parts.trainer.state)
    return {f"{split}/{name}": value for name, value in parts.trainer.evaluate(batches_of()).items()} | {"step": step}
