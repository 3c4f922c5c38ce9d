"""Checkpoints under a URL. One exists when its manifest does: payload first, manifest last, every byte under a checksum
(law 3).

    step-00000200/tensors.safetensors   model and optimizer tensors
    step-00000200/state.json            step, scaler, plain optimizer values
    step-00000200/manifest.json         size and XXH3-128 of both, written last
"""

import json
import re
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save

from toolkit import storage
from toolkit.checkpoint.state import from_plain, to_plain
from toolkit.errors import RunError

FORMAT = 1


class Checkpointer:
    """Saves, finds and loads states.

    `keep` newest stay, and the one with the best score (`mode` min or max), if any has one.
    """

    def __init__(self, url: str, keep: int = 3, mode: str = "max") -> None:
        self.url, self.keep, self.mode = url, keep, mode

    def save(self, state: Any, score: float | None = None) -> str:
        """Write the checkpoint of `state.step` and return its URL; older ones are thinned out once it is whole."""
        tensors, values = to_plain(state)
        files = {
            "tensors.safetensors": save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}),
            "state.json": json.dumps(values).encode(),
        }
        folder = self.folder(state.step)
        storage.remove(storage.join(folder, "manifest.json"))
        for name, content in files.items():
            storage.write(storage.join(folder, name), content)
        sums = {name: {"bytes": len(content), "xxh3_128": _checksum(content)} for name, content in files.items()}
        manifest = {"format": FORMAT, "step": state.step, "score": score, "files": sums}
        storage.write(storage.join(folder, "manifest.json"), json.dumps(manifest, indent=1).encode())
        self._thin_out()
        return folder

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, oldest first."""
        return [step for step in self._folders() if self.manifest(step) is not None]

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return next((step for step in reversed(self._folders()) if self.manifest(step) is not None), None)

    def best(self) -> int | None:
        """The step of the checkpoint with the best score, or None if none has one. Of equals the older one."""
        scores = {
            step: manifest["score"]
            for step in self.steps()
            if (manifest := self.manifest(step)) and manifest["score"] is not None
        }
        choose = max if self.mode == "max" else min
        return choose(scores, key=lambda step: scores[step]) if scores else None

    def load(self, step: int, state: Any) -> None:
        """Fill `state` from a checkpoint, every byte checked. Raises RunError that names the file which is damaged."""
        manifest = self.manifest(step)
        if manifest is None:
            raise RunError(f"there is no whole checkpoint of step {step} under {self.url}; there are {self.steps()}")
        contents = {}
        for name, expected in manifest["files"].items():
            url = storage.join(self.folder(step), name)
            contents[name] = storage.read(url)
            if (found := _checksum(contents[name])) != expected["xxh3_128"]:
                raise RunError(
                    f"{url} is damaged: XXH3-128 {found}, expected {expected['xxh3_128']}; "
                    f"remove {self.folder(step)} to take the one before"
                )
        try:
            tensors, values = load(contents["tensors.safetensors"]), json.loads(contents["state.json"])
        except (SafetensorError, ValueError) as error:
            raise RunError(f"{self.folder(step)} cannot be read: {error}") from error
        from_plain(state, tensors, values)

    def manifest(self, step: int) -> dict[str, Any] | None:
        """The manifest of a checkpoint whose files all have the right size, else None."""
        folder = self.folder(step)
        try:
            manifest: dict[str, Any] = json.loads(storage.read(storage.join(folder, "manifest.json")))
            whole = all(
                storage.size(storage.join(folder, name)) == entry["bytes"] for name, entry in manifest["files"].items()
            )
        except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):  # absent, torn or of another shape
            return None
        return manifest if whole and manifest.get("format") == FORMAT else None

    def folder(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:08d}")

    def _folders(self) -> list[int]:
        return [int(name[5:]) for name in storage.names(self.url) if re.fullmatch(r"step-\d{8,}", name)]

    def _thin_out(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], self.best()}
        for step in steps:
            if step not in kept:
                # The manifest first: from then on the checkpoint does not exist, whatever is killed.
                storage.remove(storage.join(self.folder(step), "manifest.json"))
                storage.remove(self.folder(step))


def _checksum(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
