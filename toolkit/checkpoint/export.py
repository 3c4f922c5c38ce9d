"""Weights for others: out of a checkpoint into one safetensors file, or into the model of a new run."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor, nn

from toolkit import storage
from toolkit.checkpoint import reader
from toolkit.checkpoint.archive import Archive
from toolkit.checkpoint.manifest import DTYPES, DamagedError, Manifest, TensorEntry
from toolkit.checkpoint.state import model_tensors, tied
from toolkit.errors import JobError, RunError
from toolkit.patterns import matched
from toolkit.secret import Secret

Find = Callable[[], int | None]


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
    anew: list[str]  # in the model, and left as it was made
    unused: list[str]  # in the checkpoint, and not taken

    def words(self) -> str:
        """What is taken and what is not, a line each."""
        where = storage.shown(self.archive.folder(self.manifest.step))
        lines = [f"weights of {where}: {len(self.sources)} tensors taken"]
        for what, names in (("begin anew", self.anew), ("not used", self.unused)):
            lines += [f"  {what}: {', '.join(names)}"] if names else []
        return "\n".join(lines)

    def load(self, model: nn.Module) -> None:
        """Put what fits into the model; averaged weights where there are some."""
        _read_into(model_tensors(model), self.archive, self.manifest, self.sources)


def _here(find: Find) -> int | None:
    return find()


def fit(url: str, model: nn.Module, but: Sequence[str] = (), choose: Callable[[Find], int | None] = _here) -> Fit:
    """Compare the newest checkpoint of a run, or the one that the URL names itself, with a model.

    Weights whose names match a pattern in `but` are left out on both sides. While that run trains, its newest
    checkpoint is another in a while: `choose` is given what looks for it, and has ranks agree on one step. Raises
    JobError if there is no checkpoint, or anything else differs between the two, or nothing is left, or a pattern
    matches nothing.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    chosen = re.fullmatch(r"step-(\d{8,15})", name)
    if isinstance(url, Secret):
        folder = Secret(folder, url.written)
    archive = Archive(folder if chosen else storage.join(url, "checkpoints"))
    try:
        step = int(chosen[1]) if chosen else choose(archive.newest)
        manifest = archive.whole(step) if step is not None else None
    except RunError as error:
        raise JobError(f"run.init_from: {error}") from error
    if manifest is None:
        raise JobError(
            f"run.init_from: {storage.shown(url)} has no whole checkpoint; give the directory of a run, or of one "
            "checkpoint, such as runs/x or runs/x/checkpoints/step-00000200"
        )
    return _compared(archive, manifest, model, but)


def _compared(archive: Archive, manifest: Manifest, model: nn.Module, but: Sequence[str]) -> Fit:
    own, ties = model_tensors(model), tied(model)
    there, where = _weights(manifest, averaged=True), storage.shown(archive.folder(manifest.step))
    names = sorted(own.keys() | there)
    known = ties | {name: name for name in names}  # a tied one has several names, and any will do
    what = f"the weights here or in {where}"
    anew = {known[name] for one in but for name in matched("run.init_except", one, sorted(known), what)}
    kept = [name for name in names if name not in anew]
    differing = {name: words for name in kept if (words := _difference(own.get(name), there.get(name)))}
    taken = {name: there[name][0] for name in kept if name not in differing}
    if not taken:
        raise JobError(f"run.init_from: nothing of {where} fits the model; use a run of a model like this one")
    if differing:
        lines = [f"{name}: {words}" for name, words in differing.items()]
        parts = sorted({f"{name.rpartition('.')[0]}.*" if "." in name else name for name in differing})
        more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise JobError(
            f"run.init_from: {where} and the model differ in\n  " + "\n  ".join(lines[:5]) + more +
            "\nuse a run of a model like this one, or say what is to begin anew, such as a new head: "
            f"run.init_except=[{', '.join(map(repr, parts[:5]))}{', …' * (len(parts) > 5)}]"
        )  # fmt: skip
    return Fit(archive, manifest, taken, sorted(anew & own.keys()), sorted(anew & there.keys()))


def _difference(own: Tensor | None, there: tuple[str, TensorEntry] | None) -> str:
    """Why a tensor of the checkpoint cannot be the model's, in words."""
    if own is None or there is None:
        return "only there" if own is None else "only here"
    before, now = there[1].shape, tuple(own.shape)
    return f"{before} there, {now} here" if before != now else ""


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
