"""What `toolkit checkpoints` does: look at a run's checkpoints, check them, remove some, hand one out, ask for one."""

import time
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from toolkit import storage
from toolkit.checkpoint import Archive, export
from toolkit.checkpoint.manifest import NAME, DamagedError, Manifest, read
from toolkit.config import Job
from toolkit.errors import JobError, RunError
from toolkit.lock import holder_of
from toolkit.persistence import archive_of, step_of
from toolkit.run import SAVE_NOW, Run

_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}


def list_all(url: str, job: Job, console: Console) -> None:
    """A table of all checkpoints, the damaged ones with what is wrong."""
    archive = archive_of(url, job)
    best = archive.best()
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("step", "samples", "score", "size", "ranks", "attempt", "saved at", ""):
        table.add_column(column, no_wrap=True)
    for step in archive.folders():
        try:
            manifest = read(archive.folder(step), step)
        except DamagedError as error:
            table.add_row(str(step), *[""] * 6, f"damaged: {error}")
            continue
        if manifest is None:
            table.add_row(str(step), *[""] * 6, "not whole: being written, or left by a killed save")
        else:
            table.add_row(str(step), *_columns(manifest), "best" if step == best else "")
    for name in archive.aside():
        table.add_row(name, *[""] * 6, "put aside as damaged")
    if not table.row_count:
        console.print(f"{storage.shown(url)} has no checkpoints yet", **_PLAIN)
        return
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    console.width = max(console.width, needed)  # the terminal wraps what is too long: a reason is worth its lines
    console.print(table)


def verify(url: str, job: Job, which: str, console: Console) -> int:
    """Read every byte of one checkpoint or of all. Returns 0, or 1 if one is damaged."""
    archive = archive_of(url, job)
    steps = [step_of(archive, which)] if which else archive.folders()
    if not steps:
        raise JobError(f"{storage.shown(url)} has no checkpoints yet; train it first")
    status = 0
    for step in steps:
        started_s = time.monotonic()
        try:
            if read(archive.folder(step), step) is None:
                console.print(f"step {step}: not whole: being written, or left by a killed save", **_PLAIN)
                continue
            manifest = archive.verify(step)
        except DamagedError as error:
            if not storage.exists(storage.join(archive.folder(step), NAME)):
                continue  # the run that trains here has removed it meanwhile
            status = 1
            console.print(f"step {step}: DAMAGED: {error}", **_PLAIN)
            continue
        size, took_s = _bytes(manifest), time.monotonic() - started_s
        console.print(f"step {step}: good, {len(manifest.files)} files, {_mib(size)} in {took_s:.2f} s", **_PLAIN)
    return status


def prune(url: str, job: Job, console: Console) -> None:
    """Remove what the job's checkpoint section does not keep, and what killed saves have left."""
    if holder := holder_of(storage.join(url, "lock"), lambda words: console.print(words, **_PLAIN)):
        raise JobError(
            f"{storage.shown(url)} is held by attempt {holder['attempt']} on host {holder['host']} "
            f"(pid {holder['pid']}), which prunes for itself; end it first"
        )
    archive = archive_of(url, job)
    cleaned, gone = archive.clean(), archive.prune()
    words = f"removed checkpoints: {', '.join(map(str, gone)) or 'none'}; leftovers of killed saves: {cleaned}"
    console.print(words, **_PLAIN)


def export_model(url: str, job: Job, which: str, to: str, averaged: bool, console: Console) -> None:
    """Write a checkpoint's model as one safetensors file."""
    archive = archive_of(url, job)
    step, to = step_of(archive, which), to or storage.join(url, "model.safetensors")
    count = export.export(archive, step, to, averaged)
    console.print(f"{storage.shown(to)}: {count} tensors of step {step}", **_PLAIN)


def save_now(url: str, timeout_s: float, console: Console) -> None:
    """Ask the process that trains here for a save, and wait until there is one."""
    run, archive = Run(url), Archive(storage.join(url, "checkpoints"))
    before = set(archive.steps())  # one that is being written now is an answer, too
    trains = (run.status() or {}).get("state") == "running"
    if trains:
        run.ask(SAVE_NOW)
        trains = holder_of(run.at("lock")) is not None  # which waits for a heartbeat, and that sees the wish
    if not trains:
        run.granted(SAVE_NOW)
        raise JobError(f"nothing trains in {storage.shown(url)}; its checkpoints: {sorted(before)}")
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for step in reversed(archive.folders()):
            if step not in before and archive.manifest(step):
                console.print(f"saved: {storage.shown(archive.folder(step))}", **_PLAIN)
                return
        time.sleep(0.5)
    failure = ((run.status() or {}).get("checkpoint") or {}).get("failure")
    raise RunError(f"no new checkpoint within {timeout_s:.0f} s{': ' + failure if failure else ''}")


def _columns(manifest: Manifest) -> tuple[str, ...]:
    score = "" if manifest.score is None else f"{manifest.score:.6g}"
    size, saved_at = _mib(_bytes(manifest)), manifest.saved_at[:16].replace("T", " ")
    return str(manifest.samples), score, size, str(manifest.world_size), str(manifest.attempt), saved_at


def _bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files.values())


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
