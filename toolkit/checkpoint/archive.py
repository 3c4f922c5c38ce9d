"""The checkpoints under a URL: which there are, which are whole, what they hold, which go. Nothing here writes one."""

import re
from collections.abc import Callable
from typing import Any

from toolkit import storage
from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint import reader, retention
from toolkit.checkpoint.manifest import DamagedError, Manifest, Values, checksum
from toolkit.checkpoint.retention import Policy
from toolkit.checkpoint.state import restore, targets
from toolkit.errors import RunError


class Archive:
    """Finds, verifies, loads and removes checkpoints.

    With a `config_digest`, only a checkpoint that has the same is loaded.
    """

    def __init__(self, url: str, policy: Policy | None = None, config_digest: str = "") -> None:
        self.url, self.policy, self.config_digest = url, policy or Policy(), config_digest

    def folder(self, step: int) -> str:
        return storage.join(self.url, _name(step))

    def folders(self) -> list[int]:
        """The steps of all that looks like a checkpoint, whole or not, oldest first."""
        return sorted(int(name[5:]) for name in storage.names(self.url) if re.fullmatch(r"step-[0-9]{8,15}", name))

    def manifest(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint whose files all have the right size, else None."""
        try:
            return manifests.read(self.folder(step), step)
        except DamagedError:
            return None

    def scores(self) -> dict[int, float | None]:
        """Step -> score of every whole checkpoint, oldest first."""
        found = {step: self.manifest(step) for step in self.folders()}
        return {step: manifest.score for step, manifest in found.items() if manifest}

    def next_attempt(self) -> int:
        """One more than that of any whole checkpoint."""
        found = [self.manifest(step) for step in self.folders()]
        return 1 + max((manifest.attempt for manifest in found if manifest), default=0)

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, oldest first."""
        return list(self.scores())

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return next((step for step in reversed(self.folders()) if self.manifest(step)), None)

    def best(self) -> int | None:
        """The step of the checkpoint with the best score, or None if none has one. Of equals the older one."""
        return self.policy.best(self.scores())

    def find(self, which: str) -> int:
        """The step that `best`, `last` or a number names. Raises RunError that lists what there is."""
        scores = self.scores()
        step = {"last": max(scores, default=None), "best": self.policy.best(scores)}.get(
            which, int(which) if which.isdecimal() else None
        )
        if step not in scores:
            raise RunError(f"{storage.shown(self.url)} has no checkpoint {which!r}; it has steps {list(scores)}")
        return step

    def load(self, step: int, state: Any) -> None:
        """Fill `state` from a checkpoint, every byte checked before it is used.

        Raises DamagedError that names the file which is damaged, RunError if it does not fit. After either, the state
        must not be trained on.
        """
        manifest = self.whole(step)
        if self.config_digest and manifest.config_digest != self.config_digest:
            where = storage.shown(self.folder(step))
            raise RunError(f"{where} was written by another job; put it back where it belongs, or use --fresh")
        values = self.values(manifest)
        places = targets(state, manifest.tensors, values)
        reader.fill(self.folder(step), manifest, places)
        restore(state, places, values)

    def whole(self, step: int) -> Manifest:
        """The manifest of a checkpoint. Raises DamagedError if it is not whole, RunError if there is none."""
        manifest = manifests.read(self.folder(step), step)
        if manifest is None:
            where = storage.shown(self.url)
            raise RunError(f"there is no whole checkpoint of step {step} under {where}; there are {self.steps()}")
        return manifest

    def values(self, manifest: Manifest) -> Values:
        """The plain values of a checkpoint. Raises DamagedError."""
        url = storage.join(self.folder(manifest.step), manifest.state)
        entry, shown = manifest.files[manifest.state], storage.shown(url)
        content = reader.content(url, entry.bytes)
        if (found := checksum(content)) != entry.xxh3_128:
            raise DamagedError(f"{shown} is damaged: its XXH3-128 is {found}, expected {entry.xxh3_128}")
        try:
            values = manifests.decoded(Values, content)
        except ValueError as error:
            raise DamagedError(f"{shown} is damaged: {error}") from None
        if values.step != manifest.step:
            raise DamagedError(f"{shown} is that of step {values.step}, not of step {manifest.step}")
        return values

    def verify(self, step: int) -> Manifest:
        """Read every byte of a checkpoint. Raises DamagedError that names the first file that is damaged."""
        manifest = self.whole(step)
        reader.verify(self.folder(step), manifest)
        self.values(manifest)
        return manifest

    def newest_or_aside(self, say: Callable[[str], None]) -> tuple[int | None, str]:
        """(the newest whole checkpoint or None, what was wrong with the last that had to be put aside on the way).

        Looks at manifests and sizes, and reads no payload.
        """
        damage = ""
        for step in reversed(self.folders()):
            try:
                if manifests.read(self.folder(step), step):
                    return step, damage
            except DamagedError as error:
                damage = str(error)
                self.put_aside(step, damage, say)
        return None, damage

    def put_aside(self, step: int, damage: str, say: Callable[[str], None]) -> None:
        """Move a damaged checkpoint out of the way, and say so."""
        place = storage.shown(retention.put_aside(self.url, _name(step)))
        say(f"{damage}\nthe checkpoint of step {step} is put aside as {place}; taking the one before")

    def aside(self) -> list[str]:
        """The names of checkpoints that were put aside as damaged."""
        return storage.names(storage.join(self.url, retention.DAMAGED))

    def clean(self) -> int:
        """Remove what killed saves have left; returns in how many folders. For the one writer, before it begins."""
        storage.abort_uploads(self.url)
        return sum(retention.clean(self.folder(step), step) for step in self.folders())

    def prune(self) -> list[int]:
        """Remove all that the policy does not keep; returns their steps."""
        gone = self.policy.too_old(self.scores())
        for step in gone:
            retention.remove(self.folder(step))
        return gone


def _name(step: int) -> str:
    return f"step-{step:08d}"
