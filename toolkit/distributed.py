"""Ranks: who this process is among how many, and what they do together. One process is a world of size 1."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from toolkit.errors import JobError, RunError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
WORLD_ASKED = "TOOLKIT_WORLD_SIZE"  # set by whoever starts the ranks
_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` counts over all nodes, `local_rank` on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """True on the one rank that writes and talks."""
        return self.rank == 0


ALONE = Ranks()


def current() -> Ranks:
    """The place in the process group that there is already, or a world of one. Which GPU is whose, it does not know."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """The place that torchrun's variables describe; without any of them, a world of one.

    A half-set environment is refused.
    """
    if not any(name in environment for name in _NUMBERS[:3]):
        _refuse_alone(environment)
        return ALONE
    _refuse_halves(environment)
    ranks = Ranks(*(int(environment[name]) for name in _NUMBERS[:3]))
    if not ranks.local_rank <= ranks.rank < ranks.world_size:
        values = {name: environment[name] for name in _NUMBERS}
        raise JobError(f"the environment's ranks do not fit together: {values}; LOCAL_RANK <= RANK < WORLD_SIZE")
    return ranks


def _refuse_alone(environment: Mapping[str, str]) -> None:
    """Raises JobError where a process without a rank is one of several: each would train for itself."""
    if (tasks := environment.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        raise JobError(
            f"this is one of {tasks} tasks that srun has started, and none has a rank, so each would train for itself; "
            "start one task a node, and in it torchrun"
        )
    if asked := environment.get(WORLD_ASKED):
        raise JobError(f"{asked} ranks were asked for, but RANK, WORLD_SIZE and LOCAL_RANK are not set; use torchrun")


def _refuse_halves(environment: Mapping[str, str]) -> None:
    """Raises JobError where the environment says too little, or not what was asked for."""
    given = [name for name in _NUMBERS[:3] if name in environment]
    missing = [name for name in (*_NUMBERS, "MASTER_ADDR") if not environment.get(name)]
    if missing:
        remedy = "start with torchrun, which sets all, or unset them"
        raise JobError(f"the environment sets {', '.join(given)} but not {', '.join(missing)}; {remedy}")
    values = {name: environment[name] for name in _NUMBERS}
    if not all(value.isdecimal() for value in values.values()):
        raise JobError(f"the environment's {', '.join(_NUMBERS)} must be whole numbers, not {values}")
    size, address = environment["WORLD_SIZE"], environment["MASTER_ADDR"]
    if (asked := environment.get(WORLD_ASKED, size)) != size:
        raise JobError(f"the world has {size} ranks where {asked} were asked for ({WORLD_ASKED})")
    if environment.get("LOCAL_WORLD_SIZE", size) != size and re.match(r"localhost$|127\.|::1$", address):
        raise JobError(
            f"MASTER_ADDR is {address}, which is another machine on each, but only "
            f"{environment['LOCAL_WORLD_SIZE']} of {size} ranks are here; give the head node's address"
        )


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank. Raises JobError where the one that was asked for is not there."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        name = next(kind for kind in available if kind != "mps" or ranks.world_size == 1)  # ranks cannot talk over mps
    if name not in available:
        raise JobError(
            f"train.device is {name}, but this machine offers {', '.join(available)}; use one of these or auto"
        )
    if name != "cuda":
        return torch.device(name)
    if ranks.local_rank >= (count := torch.cuda.device_count()):
        raise JobError(f"local rank {ranks.local_rank} has no GPU of its own: {count} visible; start fewer processes")
    torch.cuda.set_device(ranks.local_rank)  # before the process group, or every rank would talk through GPU 0
    return torch.device("cuda", ranks.local_rank)


def choose_precision(name: str, device: torch.device) -> str:
    """What `auto` means on a device: bf16 where a GPU has it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def join(ranks: Ranks, device: torch.device, patience_s: float = 0) -> None:
    """Meet the other ranks. None waits for another for more than half an hour, or a little more than `patience_s`."""
    if ranks.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_timeout(patience_s), world_size=ranks.world_size, rank=ranks.rank)


def _timeout(patience_s: float) -> timedelta:
    return timedelta(seconds=max(_TIMEOUT_S, patience_s * 1.1))


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


# Groups that have been left, until the process ends: gloo's destructor holds the GIL while it waits for its threads,
# and one of them may be waiting for the GIL, to let go of the tensor of the last reduction.
_left: list[Any] = []


def wrap(model: nn.Module, device: torch.device, grad_compression: str | None = None) -> nn.Module:
    """The model with gradients averaged over the ranks; itself in a world of one, or if it is sharded.

    `grad_compression` bf16 halves what travels.
    """
    if not dist.is_initialized() or is_sharded(model):
        return model
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if grad_compression:
        wrapped.register_comm_hook(None, _in_bf16)
    return wrapped


def _in_bf16(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    return bf16_compress_hook(group, bucket)  # by its own name DDP takes it with NCCL only, and gloo can do it, too


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of every parameter, and gathers and averages by itself; see toolkit/sharding.py.

    Then ranks must step together: every forward and backward pass of one is one of all.
    """
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left gathered: it would hide new values."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def without_sync(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Backward passes in here keep their gradients to this rank if `skip`, so that the last micro-batch sends the sum
    once.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not skip)
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _NOTHING


_NOTHING: AbstractContextManager[None] = nullcontext()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def same_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, such as the running statistics of batch norm."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def from_rank_0(decide: Callable[[], Any]) -> Any:
    """What rank 0's `decide` returns, on every rank; its errors, too, so that no rank waits for one that has left.

    The value travels as JSON, so it must be plain data.
    """
    if not dist.is_initialized():
        return decide()
    error: Exception | None = None
    answer = {}
    if dist.get_rank() == 0:
        try:
            answer = {"value": decide()}
        except (JobError, RunError, OSError) as refusal:
            error, answer = refusal, {"refused" if isinstance(refusal, JobError) else "failed": str(refusal)}
    answer = _broadcast(answer, 0)
    if error:
        raise error
    if "refused" in answer:
        raise JobError(answer["refused"])
    if "failed" in answer:
        raise RunError(answer["failed"])
    return answer["value"]


def gathered(value: Any) -> list[Any]:
    """Every rank's plain data, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([content.numel()]))
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    padded[: content.numel()] = content
    places = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(places, padded)
    return [json.loads(place[: int(size)].numpy().tobytes()) for place, size in zip(places, sizes, strict=True)]


def from_all_ranks(value: float) -> list[float]:
    """Every rank's number, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    numbers[dist.get_rank()] = value
    dist.all_reduce(numbers)
    found: list[float] = numbers.tolist()
    return found


def first_of_ranks(words: str) -> str:
    """The words of the lowest rank that has any, on every rank; nothing if none has."""
    if not dist.is_initialized():
        return words
    world_size, rank = dist.get_world_size(), dist.get_rank()
    first = torch.tensor([rank if words else world_size])
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return str(_broadcast(words, int(first))) if int(first) < world_size else ""


def _broadcast(value: Any, source: int) -> Any:
    """One rank's plain data on every rank."""
    content = torch.empty(0, dtype=torch.uint8)
    if dist.get_rank() == source:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([content.numel()])
    dist.broadcast(length, source)
    content = content if content.numel() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, source)
    return json.loads(content.numpy().tobytes())
