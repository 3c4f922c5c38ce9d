"""Whether all ranks are of one world: the same code, torch, image and threads. If not, sums differ, or worse."""

import hashlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import toolkit
from toolkit import distributed
from toolkit.drift import moved
from toolkit.errors import JobError
from toolkit.provenance import source_code

MUST_AGREE = ("toolkit", "git commit", "changes since", "image", "image commit", "python", "torch", "cuda", "threads")


def meet() -> dict[str, Any]:
    """Compare all ranks, once at the start. Returns what is worth knowing of this machine and code, and all hosts.

    Raises JobError on every rank that names the odd one, with what it has and what the others have.
    """
    mine = describe()
    code = source_code(os.environ.get("TOOLKIT_CODE") or os.getcwd())
    if not code and (commit := os.environ.get("TOOLKIT_GIT_COMMIT")):  # docker/run says it: an image has no git to ask
        code = {"git_commit": commit}
    told = {key: mine[key] for key in ("host", "image", "torch", "cuda", "threads")} | {
        "image commit": mine["image_commit"],
        "toolkit": toolkit.__version__,
        "python": platform.python_version(),
        "git commit": code.get("git_commit"),
        "changes since": hashlib.sha256(code.get("git_diff", "").encode()).hexdigest()[:12],
    }
    found = distributed.gathered(told)
    refuse_odd(found)
    return mine | code | {"hosts": [rank["host"] for rank in found]}


def refuse_odd(found: Sequence[Mapping[str, Any]]) -> None:
    """Raises JobError if one of some ranks is not like most of the others."""
    lines = []
    for key in MUST_AGREE:
        counts = Counter(str(rank[key]) for rank in found)
        (most, count), *_ = counts.most_common(1)
        for number, rank in enumerate(found):
            if str(rank[key]) != most:
                lines.append(f"rank {number} on host {rank['host']} has {key} {rank[key]}, {count} ranks have {most}")
    if lines:
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise JobError(
            "the ranks are not of one world:\n  " + "\n  ".join(lines[:8]) + more +
            "\ngive every node the same code, packages, image and OMP_NUM_THREADS"
        )  # fmt: skip


def see_the_same(data: Mapping[str, Any]) -> None:
    """Raises JobError on every rank if one knows other things of the training set than rank 0."""
    found = distributed.gathered(dict(data))
    for rank, other in enumerate(found):
        if lines := moved(found[0], other):
            raise JobError(
                f"rank {rank} sees other training data than rank 0:\n  " + "\n  ".join(lines) +
                "\ngive every node the same data, and leave them as they are while a run starts"
            )  # fmt: skip


def describe() -> dict[str, Any]:
    """What is worth knowing of this process's machine for provenance, and who it is for the run's lock."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot_id": _kernel_says(lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()),
        "pid_namespace": _kernel_says(lambda: os.readlink("/proc/self/ns/pid")),
        "slurm_job_id": _slurm_job(),
        "slurm_restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "image": os.environ.get("TOOLKIT_IMAGE") or os.environ.get("APPTAINER_CONTAINER"),
        "image_commit": os.environ.get("TOOLKIT_IMAGE_COMMIT"),  # of the code that lies in it; a snapshot's goes before
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _slurm_job() -> str | None:
    """As Slurm's commands take it: SLURM_JOB_ID of one of an array's tasks is that of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _kernel_says(read: Callable[[], str]) -> str | None:
    """What Linux says; None elsewhere."""
    try:
        return read()
    except OSError:
        return None
