"""Saving beside the loop, and resuming. A checkpoint exists when its manifest does: payload first, manifest last, every
byte under a checksum (law 3). FORMAT.md says what the files hold.

    checkpointer = Checkpointer("s3://bucket/run/checkpoints")
    checkpointer.resume(state)              # the newest that is whole, or None
    checkpointer.save(state)                # returns once the state is copied; the rest is written beside the loop
    checkpointer.wait()                     # before leaving

Every rank makes the same calls.
"""

import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch

import toolkit
from toolkit import distributed, storage
from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import retention, writer
from toolkit.checkpoint.archive import Archive
from toolkit.checkpoint.manifest import DamagedError, FileEntry, Manifest, Part, Values, checksum
from toolkit.checkpoint.plan import shards_of
from toolkit.checkpoint.state import to_plain, varying
from toolkit.checkpoint.writer import Snapshot, Snapshots
from toolkit.distributed import Ranks
from toolkit.errors import RunError

Action = Callable[[], None]


def _nothing() -> None:
    pass


class Checkpointer:
    """Saves and resumes states: objects with `model`, `optimizer`, `step` and, perhaps, `scaler`, `ema` and `best`.

    A save is whole or it is none, whatever is killed; what is resumed is bit for bit what was saved, on any number of
    ranks: also what the optimizer keeps in its groups, such as a learning rate that was changed, unless it is now built
    with another default. What counts by itself beside the state, such as a scheduler of torch's, is not saved: keep its
    `state_dict`, and take no steps with it to catch up, for the learning rate is where it was.

    The model is the module itself, not DDP's wrapper. `archive` is the URL of a folder, which keeps the newest three,
    or an Archive with a policy of its own. `ranks` default to the process group's, or to a world of one.

    `attempt` is this writer's number among those of the run, so that no file has the name of another's; without one it
    is one more than that of any checkpoint there is. `check_lock` raises RunError once a higher one has taken over.
    `global_batch_size` is for the manifests, which count samples.
    """

    def __init__(
        self,
        archive: Archive | str,
        ranks: Ranks | None = None,
        attempt: int | None = None,
        global_batch_size: int = 0,
        check_lock: Action = _nothing,
    ) -> None:
        self.archive = Archive(archive) if isinstance(archive, str) else archive
        self.ranks, self.attempt, self.check_lock = ranks or distributed.current(), attempt, check_lock
        self.global_batch_size = global_batch_size
        self.saves = 0
        self.reasons: list[str] = []  # why saves have failed, all of them
        self.failure: str | None = None  # that of the last save, if it did
        self.saved_step: int | None = None  # the last that this rank has written, rank 0 with its manifest
        self.took_s, self.stalled_s = 0.0, 0.0  # of the last save, and how long of it the loop stood still
        self._scores: dict[int, float | None] | None = None
        self._failed: list[int] = []  # steps of saves that failed
        self._snapshots = Snapshots(self.ranks)
        self._pool = ThreadPoolExecutor(1, "toolkit-save")
        self._running: Future[Any] | None = None

    def resume(self, state: Any, say: Callable[[str], None] = print) -> int | None:
        """Load the newest checkpoint that is whole, on every rank, and return its step; None if there is none.

        What killed saves have left is removed, and what is too old. One that is damaged is named through `say`, put
        aside under damaged/, and the one before is taken. Raises RunError if none is left.
        """
        damage, self._scores = "", None
        distributed.from_rank_0(self.archive.clean)
        while True:
            step, words = distributed.from_rank_0(lambda: self.archive.newest_or_aside(say))
            damage = words or damage
            if step is None:
                break
            found = distributed.first_of_ranks(self._tried(step, state))
            if not found:
                if self.ranks.leads:
                    with suppress(OSError):  # a kill may have come between a commit and what it made too old
                        self.archive.prune()
                return int(step)
            damage = found
            distributed.from_rank_0(partial(self.archive.put_aside, step, found, say))
        if aside := distributed.from_rank_0(self.archive.aside):
            where = storage.shown(storage.join(self.archive.url, retention.DAMAGED))
            raise RunError(
                f"no checkpoint is left that is whole; {where} holds {', '.join(aside)}. {damage}\n"
                f"to begin at step 0 again, use --fresh, or remove {where}"
            )
        return None

    def prepare(self, state: Any) -> None:
        """Make room for snapshots of this state beside the loop, so that the first save is as quick as the others."""
        shards = shards_of(to_plain(state)[0], varying(state))
        self.wait()
        self._running = self._pool.submit(self._snapshots.prepare, shards)

    def save(self, state: Any, score: float | None = None, before_commit: Action = _nothing) -> None:
        """Copy the state, then write it beside the loop; a save still in flight is waited for.

        A save that fails raises nothing: `failure` says why, older checkpoints are as they were. `before_commit` is
        called on rank 0 when all is written but the manifest.
        """
        started_s = time.monotonic()
        self.wait()
        tensors, values = to_plain(state)
        snapshot = self._snapshots.take(shards_of(tensors, varying(state)))
        self.saves += 1
        if self.attempt is None:
            self.attempt = distributed.from_rank_0(self.archive.next_attempt)
        serial = f"{self.attempt}.{self.saves}"
        if self.ranks.leads:
            self._running = self._pool.submit(self._save, values.step, self._write_whole, snapshot, serial, values,
                                              score, before_commit)  # fmt: skip
        elif self.ranks.rank in snapshot.plan.writers:
            self._running = self._pool.submit(self._save, values.step, self._write_part, snapshot, serial)
        self.stalled_s = time.monotonic() - started_s

    def wait(self) -> None:
        """Until nothing is in flight. Raises what no retry can mend, such as that another writer has taken over."""
        running, self._running = self._running, None
        if running:
            running.result()

    @property
    def failures(self) -> int:
        """How many saves have failed."""
        return len(self.reasons)

    @property
    def saving(self) -> bool:
        """Whether a save is in flight."""
        return self._running is not None and not self._running.done()

    def _tried(self, step: int, state: Any) -> str:
        """Load on this rank. Returns what is damaged, or nothing."""
        try:
            self.archive.load(step, state)
        except DamagedError as error:
            return str(error)
        return ""

    def _save(self, step: int, write: Callable[..., None], *what: Any) -> None:
        started_s = time.monotonic()
        try:
            write(self.archive.folder(step), *what)
        except OSError as error:
            self._failed.append(step)
            self.failure = f"the checkpoint of step {step} could not be saved: {error}"
            self.reasons.append(self.failure)
        else:
            self.failure, self.saved_step, self.took_s = None, step, time.monotonic() - started_s

    def _write_part(self, folder: str, snapshot: Snapshot, serial: str) -> None:
        url = storage.join(folder, writer.part_name(serial, self.ranks.rank))
        try:
            writer.check_space(folder, snapshot.plan.bytes)
            part = writer.write_share(folder, serial, self.ranks.rank, snapshot)
        except OSError as error:
            with suppress(OSError), storage.patience(writer.CLEAN_UP_S):  # if not, rank 0 sees that nothing comes
                storage.write(url, Part(error=str(error)).model_dump_json().encode())
            raise
        storage.write(url, part.model_dump_json().encode())

    def _write_whole(
        self, folder: str, snapshot: Snapshot, serial: str, values: Values, score: float | None, before_commit: Action
    ) -> None:
        """Rank 0's side: its share, everyone's parts, the manifest, and only then the end of what is too old."""
        self._clean_failed()
        writer.check_space(folder, max(snapshot.plan.bytes, snapshot.plan.replicated_bytes))
        state_name, state = f"state-{serial}.json", values.encoded()
        written = [state_name]
        try:
            parts = [writer.write_share(folder, serial, 0, snapshot)]
            written += parts[0].files
            storage.write(storage.join(folder, state_name), state)
            for name, part in writer.other_parts(folder, serial, snapshot.plan.writers - {0}):
                parts.append(part)
                written += [name, *part.files]
            files = {state_name: FileEntry(bytes=len(state), xxh3_128=checksum(state))}
            manifest = self._manifest(values.step, score, state_name, writer.joined([*parts, Part(files=files)]))
            writer.check_sizes(folder, manifest)
            content = manifest.encoded()
            if path := storage.local_path(self.archive.url):
                storage.sync_folder(path)  # the name of the step's folder must be as safe as its files
            before_commit()
            self.check_lock()
        except BaseException:
            writer.clean_up(folder, written)
            raise
        self._commit(folder, manifest, content)  # if this fails, nobody knows yet whether it did: see _clean_failed
        self._tidy(folder, manifest)

    def _clean_failed(self) -> None:
        """Remove what failed saves have left: files of other ranks, or those that the store would not let go. One
        whose manifest did arrive, though the answer was lost, is a checkpoint like any other.
        """
        while self._failed:
            retention.clean(self.archive.folder(self._failed[-1]), self._failed[-1])
            self._failed.pop()
            self._scores = None

    def _manifest(self, step: int, score: float | None, state_name: str, whole: Part) -> Manifest:
        versions = {"toolkit": toolkit.__version__, "torch": str(torch.__version__)}
        return Manifest(
            step=step,
            samples=step * self.global_batch_size,
            world_size=self.ranks.world_size,
            attempt=self.attempt or 0,
            score=score,
            config_digest=self.archive.config_digest,
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            versions=versions | {"python": platform.python_version()},
            state=state_name,
            files=whole.files,
            tensors=whole.tensors,
        )

    def _commit(self, folder: str, manifest: Manifest, content: bytes) -> None:
        """Publish, unless a later attempt has. Of two manifests for one step that of the higher attempt stays."""
        url = storage.join(folder, manifests.NAME)
        if storage.create(url, content):
            return
        try:
            there = manifests.parse(storage.read(url))
        except ValueError:
            there = None
        if there and there.attempt > manifest.attempt:
            raise RunError(
                f"{storage.shown(url)} is already that of attempt {there.attempt}; this is {manifest.attempt}"
            )
        storage.write(url, content)

    def _tidy(self, folder: str, manifest: Manifest) -> None:
        """After a commit: parts and a replaced manifest's files go, then the checkpoints that need not stay."""
        with suppress(OSError):  # what cannot be removed now will be too old at the next save as well
            if self._scores is None:
                self._scores = self.archive.scores()
            self._scores[manifest.step] = manifest.score
            retention.remove_strays(folder, manifest)
            for step in self.archive.policy.too_old(self._scores):
                retention.remove(self.archive.folder(step))
                del self._scores[step]
