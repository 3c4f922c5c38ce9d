"""Weights for others: out of a checkpoint into one safetensors file, or into the model of a new run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor, nn

from toolkit import storage
from toolkit.checkpoint import reader
from toolkit.checkpoint.archive import Archive
from toolkit.checkpoint.manifest import DTYPES, DamagedError, Manifest, TensorEntry
from toolkit.checkpoint.state import model_tensors
from toolkit.errors import JobError, RunError
from toolkit.secret import Secret


def export(archive: Archive, step: int, url: str, averaged: bool = True) -> int:
    """Write a checkpoint's model to a safetensors file, and return how many tensors it holds.

    Their names are those of the model's state_dict, tied ones under each of theirs. Where there are averaged weights
    (EMA) they are taken, for it is they that were evaluated; `averaged=False` takes those that were trained.
    """
    manifest = archive.whole(step)
    sources = _weights(manifest, averaged)
    tensors = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, (_, entry) in sources.items()}
    reader.fill(archive.folder(step), manifest, {sources[name][0]: tensor for name, tensor in tensors.items()})
    for name, first in archive.values(manifest).tied.items():
        if first not in tensors:
            where = storage.shown(storage.join(archive.folder(step), manifest.state))
            raise DamagedError(f"{where}: {name} is tied to {first}, which the checkpoint has not")
        tensors[name] = tensors[first].clone()
    about = {"format": "pt", "step": str(step), "config_digest": manifest.config_digest}
    try:
        content = save(tensors, metadata=about)
    except KeyError as error:
        raise RunError(f"safetensors has no type {error}; {storage.shown(url)} is not written") from error
    storage.write(url, content)
    return len(tensors)


def load(archive: Archive, step: int, model: nn.Module, averaged: bool = True) -> None:
    """Give a model the weights of a checkpoint, `averaged` as in `export`.

    Raises RunError if they are not those of this very model.
    """
    manifest, own = archive.whole(step), model_tensors(model)
    there = _weights(manifest, averaged)
    odd = sorted(there.keys() ^ own.keys())
    odd += sorted(name for name in there.keys() & own if there[name][1].shape != tuple(own[name].shape))
    if odd:
        where = storage.shown(archive.folder(step))
        raise RunError(f"{where} is of another model: {', '.join(odd)} differ; give it the model that it was saved of")
    _read_into(own, archive, manifest, {name: source for name, (source, _) in there.items()})


@dataclass
class Fit:
    """What of a checkpoint a model can begin with."""

    archive: Archive
    manifest: Manifest
    sources: dict[str, str]  # name in the model -> name in the checkpoint
    missing: list[str] = field(default_factory=list)  # in the model only
    left_over: list[str] = field(default_factory=list)  # in the checkpoint only
    shapes: list[str] = field(default_factory=list)  # in both, but not alike

    def words(self) -> str:
        """What is taken and what is not, a line each."""
        lines = [
            f"weights of {storage.shown(self.archive.folder(self.manifest.step))}: {len(self.sources)} tensors taken"
        ]
        for what, names in (
            ("left as they were made", self.missing),
            ("not used", self.left_over),
            ("of another shape", self.shapes),
        ):
            lines += [f"  {what}: {', '.join(names)}"] if names else []
        return "\n".join(lines)

    def load(self, model: nn.Module) -> None:
        """Put what fits into the model; averaged weights where there are some."""
        _read_into(model_tensors(model), self.archive, self.manifest, self.sources)


def fit(url: str, model: nn.Module) -> Fit:
    """Compare the newest checkpoint of a run, or the one that the URL names itself, with a model.

    Raises JobError if there is none, or nothing of it fits.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    chosen = re.fullmatch(r"step-(\d{8,15})", name)
    if isinstance(url, Secret):
        folder = Secret(folder, url.written)
    archive = Archive(folder if chosen else storage.join(url, "checkpoints"))
    try:
        step = int(chosen[1]) if chosen else archive.newest()
        manifest = archive.whole(step) if step is not None else None
    except RunError as error:
        raise JobError(f"run.init_from: {error}") from error
    if manifest is None:
        raise JobError(
            f"run.init_from: {storage.shown(url)} has no whole checkpoint; give the directory of a run, or of one "
            "checkpoint, such as runs/x or runs/x/checkpoints/step-00000200"
        )
    return _compared(archive, manifest, model_tensors(model))


def _compared(archive: Archive, manifest: Manifest, own: Mapping[str, Tensor]) -> Fit:
    there = _weights(manifest, averaged=True)
    found = Fit(archive, manifest, {}, sorted(own.keys() - there), sorted(there.keys() - own))
    for name in sorted(own.keys() & there):
        source, entry = there[name]
        if entry.shape == tuple(own[name].shape):
            found.sources[name] = source
        else:
            found.shapes.append(f"{name} {entry.shape} there, {tuple(own[name].shape)} here")
    if not found.sources:
        raise JobError(f"run.init_from: nothing fits the model\n{found.words()}\nuse a run of a model like this one")
    return found


def _read_into(own: Mapping[str, Tensor], archive: Archive, manifest: Manifest, sources: Mapping[str, str]) -> None:
    """Fill a model's tensors from those of a checkpoint; `sources` are the latter's names by the former's."""
    read = {
        name: torch.empty_like(own[name], dtype=DTYPES[manifest.tensors[source].dtype], requires_grad=False)
        for name, source in sources.items()
    }
    reader.fill(archive.folder(manifest.step), manifest, {sources[name]: tensor for name, tensor in read.items()})
    for name, tensor in read.items():
        own[name].copy_(tensor)


def _weights(manifest: Manifest, averaged: bool) -> dict[str, tuple[str, TensorEntry]]:
    """Name in the model -> (name in the checkpoint, entry)."""
    kinds = ("model/", "ema/") if averaged else ("model/",)
    return {
        name.removeprefix(kind): (name, entry)
        for kind in kinds
        for name, entry in manifest.tensors.items()
        if name.startswith(kind)
    }
