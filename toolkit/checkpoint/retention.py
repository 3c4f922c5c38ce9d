"""What stays, and what goes: old checkpoints, leftovers of killed saves, damaged ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit import storage
from toolkit.checkpoint import manifest as manifests
from toolkit.checkpoint.manifest import DamagedError, Manifest

DAMAGED = "damaged"


@dataclass(frozen=True)
class Policy:
    """`keep` newest, the best by score, and those whose step `keep_every` divides."""

    keep: int = 3
    mode: str = "max"
    keep_every: int | None = None

    def best(self, scores: Mapping[int, float | None]) -> int | None:
        """The step with the best score, or None if none has one. Of equals the older one."""
        scored = {step: score for step, score in sorted(scores.items()) if score is not None}
        choose = max if self.mode == "max" else min
        return choose(scored, key=lambda step: scored[step]) if scored else None

    def too_old(self, scores: Mapping[int, float | None]) -> list[int]:
        """Of whole checkpoints those that go. The newest never does."""
        steps = sorted(scores)
        kept = {*steps[-max(1, self.keep) :], self.best(scores)}
        return [step for step in steps if step not in kept and not (self.keep_every and step % self.keep_every == 0)]


def remove(folder: str) -> None:
    """Remove a checkpoint: its manifest first, so that from then on it does not exist, whatever is killed."""
    storage.remove(storage.join(folder, manifests.NAME))
    storage.remove(folder)


def remove_strays(folder: str, manifest: Manifest) -> bool:
    """Remove what is in a checkpoint's folder but not of it. Returns whether there was anything."""
    strays = set(storage.names(folder)) - {manifests.NAME, *manifest.files}
    for name in strays:
        storage.remove(storage.join(folder, name))
    return bool(strays)


def clean(folder: str, step: int) -> bool:
    """Remove a folder that never became a checkpoint, and what a killed save left in one that did. Returns whether
    there was anything; a damaged one is left as it is.
    """
    try:
        manifest = manifests.read(folder, step)
    except DamagedError:
        return False
    if manifest is not None:
        return remove_strays(folder, manifest)
    storage.remove(folder)
    return True


def put_aside(url: str, folder_name: str) -> str:
    """Move a damaged checkpoint under damaged/, whatever it holds. Returns where it is now."""
    taken = set(storage.names(storage.join(url, DAMAGED)))
    name = next(
        name
        for number in range(len(taken) + 1)
        if (name := folder_name if number == 0 else f"{folder_name}-{number + 1}") not in taken
    )
    place = storage.join(url, DAMAGED, name)
    storage.move(storage.join(url, folder_name), place)
    return place
