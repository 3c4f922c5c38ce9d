"""One job file becomes one durable run: PyTorch training that survives its machines.

Importing this package imports no torch; each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpointer": "toolkit.checkpoint",
    "ElasticDistributedSampler": "toolkit.datasets.sampler",
    "JobError": "toolkit.errors",
    "Run": "toolkit.results",
    "RunError": "toolkit.errors",
    "Trainer": "toolkit.trainer",
    "launch": "toolkit.notebook",
    "load_job": "toolkit.config",
    "submit": "toolkit.submission",
    "train": "toolkit.session",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604 - the names are the keys above


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
