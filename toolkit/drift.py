"""What makes two starts those of one run, and what makes them two."""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any

# What may differ between two starts of one run. All else makes another run, whatever it is called.
MAY_CHANGE = {
    "run.dir", "run.name", "data.workers", "train.epochs", "train.max_steps", "train.micro_batch_size", "train.device",
    "train.compile", "train.channels_last", "train.on_nan", "train.max_rollbacks", "train.spike_grad_norm",
    "train.strategy", "train.activation_checkpointing", "eval", "checkpoint", "log", "launch",
}  # fmt: skip


def changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two jobs of one run and may not, as `key: old -> new`."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        at, before, after = prefix + key, old.get(key), new.get(key)
        if at in MAY_CHANGE or before == after or (_says_nothing(at, before) and _says_nothing(at, after)):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed(before, after, f"{at}.")
        else:
            lines.append(f"{at}: {before!r} -> {after!r}")
    return lines


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now` was something else before, as `key: old -> new`; what was not known then is as it was."""
    pairs = {key: (before.get(key, value), value) for key, value in now.items()}
    return [f"{key}: {reprlib.repr(old)} -> {reprlib.repr(new)}" for key, (old, new) in pairs.items() if old != new]


def digest(job: Mapping[str, Any], resolved: Mapping[str, Any]) -> str:
    """Equal for two jobs exactly if one may resume the other."""
    fixed = json.dumps([_fixed(job), dict(resolved)], sort_keys=True)
    return hashlib.sha256(fixed.encode()).hexdigest()[:32]


def _fixed(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _fixed(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if prefix + key not in MAY_CHANGE and not _says_nothing(prefix + key, value)
    }


def _says_nothing(at: str, value: Any) -> bool:
    """Whether a key could as well be left out, as in a run older than it. Defaults of `args` are a component's."""
    return "args" not in at.split(".") and (value is None or value is False or value in ({}, []))
