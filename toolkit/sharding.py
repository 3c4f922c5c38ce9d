"""FSDP2 (Zhao et al., arXiv:2304.11277): every rank holds a share of each weight, of its gradient and of what the
optimizer remembers of it. And activation checkpointing, by the same blocks.

A model's blocks are gathered, computed and let go of one after another. It may name them: an attribute `blocks`, an
nn.ModuleList or nn.Sequential. Else they are the elements of its outermost ModuleLists and Sequentials that have
parameters. A block is called as a module, `block(x)`, or its weights are not there. What is in no block is gathered for
the whole of a forward or backward pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from toolkit import distributed
from toolkit.errors import JobError

Build = Callable[[], nn.Module]
_CONTAINERS = (nn.ModuleList, nn.Sequential)


def build(make: Build, name: str, device: torch.device, precision: str, eval_precision: str) -> nn.Module:
    """The model that `make` makes, sharded over all ranks, with rank 0's weights and buffers, bit for bit.

    Rank 0 makes it whole, on the host; the others never hold more of it than one tensor at a time. Raises JobError that
    names the model if it cannot be made without its values, or not be sharded.
    """
    if precision == "bf16" and eval_precision != "bf16":
        raise JobError(
            f"eval.precision is {eval_precision}, but with train.strategy fsdp and train.precision bf16 ranks exchange "
            "weights in bf16; use eval.precision=bf16, or train.strategy=ddp"
        )
    model = _without_values(make, name)
    try:
        shard(model, device, precision)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise JobError(f"model {name!r} cannot be sharded: {error}; use train.strategy=ddp") from error
    model.to_empty(device=device)
    _fill(model, make, device)
    if any(True for _ in model.buffers()):
        model.register_forward_pre_hook(torch.compiler.disable(_same_buffers))  # here, for it imports a compiler
    return model


def shard(model: nn.Module, device: torch.device, precision: str) -> None:
    """Make each block, and the rest together, one group that is gathered at once, over all ranks. Names stay.

    With `precision` bf16 weights travel and are used in bf16; gradients are summed in fp32, and what a rank holds is
    fp32. That is meant to be used under autocast, which keeps norms, softmax and losses in fp32 as it does for DDP.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    full, norms = MixedPrecisionPolicy(), list[nn.Module]()
    policy = full
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]  # their statistics are fp32
    for parameter in model.parameters():  # or one in channels last, for example, is refused
        parameter.data = parameter.data.contiguous()
    for part in dict.fromkeys([*norms, *_untied(model), model]):
        fully_shard(part, mesh=mesh, mp_policy=full if part in norms else policy)


def with_sync_batch_norm(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """The model with batch norms that normalise over the samples of all ranks. Names stay. On one rank it is the same.

    Raises JobError on a device for which torch has none.
    """
    if world_size == 1:
        return model
    if device.type != "cuda":
        raise JobError(f"train.sync_batch_norm needs GPUs, and the device is {device.type}; set it to false")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]


def recompute(model: nn.Module, compiled: bool = False) -> None:
    """Have each block keep its inputs only, and compute all else again in the backward pass (Chen et al.,
    arXiv:1604.06174).

    What is drawn, such as dropout, and what buffers hold is as it was the first time, so training is the same, bit for
    bit. Names of parameters stay. Raises JobError if there are no blocks, or torch.compile does not know them.
    """
    found = blocks(model)
    if not found:
        raise JobError(
            "train.activation_checkpointing finds no blocks in the model: no nn.ModuleList or nn.Sequential has an "
            "element with parameters; give the model an attribute `blocks`, or set it to false"
        )
    if compiled and any(True for block in found for _ in block.buffers()):
        raise JobError(
            "train.compile and train.activation_checkpointing do not go together where blocks have buffers, such as "
            "the statistics of batch norm; set one of them to false"
        )
    for block in found:
        block.forward = partial(_computed_twice, block, block.forward)


def blocks(model: nn.Module) -> list[nn.Module]:
    """See the module's docstring. Each comes once."""
    named = getattr(model, "blocks", None)
    return [*dict.fromkeys(named if isinstance(named, _CONTAINERS) else _elements(model))]


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        callable_part = isinstance(module, _CONTAINERS) and not isinstance(child, nn.ModuleList | nn.ModuleDict)
        if not callable_part:
            yield from _elements(child)
        elif any(True for _ in child.parameters()):
            yield child


def _untied(model: nn.Module) -> list[nn.Module]:
    """The blocks that share no weight with another part: a weight can be in one group only, and the root's is open all
    the time.
    """
    uses = Counter(map(id, _parameters(model)))
    return [
        block for block in blocks(model) if all(uses[at] == n for at, n in Counter(map(id, _parameters(block))).items())
    ]


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of a module, tied ones as often as they are used."""
    return [parameter for _, parameter in module.named_parameters(remove_duplicate=False)]


def _without_values(make: Build, name: str) -> nn.Module:
    """The model on the meta device: shapes and types alone."""
    remedy = "use train.strategy=ddp"
    try:
        with torch.device("meta"):
            model = make()
    except JobError as error:
        make()  # raises as well if the model is at fault
        raise JobError(
            f"{error}\ntrain.strategy fsdp makes it on torch's meta device, without values; {remedy}"
        ) from error
    left = [
        f"{prefix}.{attribute}".removeprefix(".")
        for prefix, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    if left:
        raise JobError(
            f"model {name!r} keeps {', '.join(left)} as plain tensors, to which train.strategy fsdp can give no "
            f"values; make them buffers with register_buffer(name, tensor, persistent=False), or {remedy}"
        )
    return model


@torch.no_grad()
def _fill(model: nn.Module, make: Build, device: torch.device) -> None:
    """Give every rank its part of what rank 0 makes, tensor by tensor."""
    made: list[nn.Module] = []
    distributed.from_rank_0(lambda: made.append(make()))
    values = [tensor for whole in made for tensor in _tensors(whole)]
    for at, own in enumerate(_tensors(model)):
        value = values[at].detach() if values else torch.empty(own.shape, dtype=own.dtype)
        value = value.to(device).contiguous()
        dist.broadcast(value, 0)
        if isinstance(own, DTensor):
            value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(value)


def _same_buffers(model: nn.Module, inputs: Any) -> None:
    """As under DDP, training goes by rank 0's buffers: a resumed run has no others."""
    if model.training:
        group, once_bytes = dist.group.WORLD, 1 << 28
        dist._broadcast_coalesced(group, [*model.buffers()], once_bytes, 0)  # type: ignore[attr-defined,arg-type]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _computed_twice(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    if not any(True for _ in block.buffers()):
        return checkpoint(forward, *inputs, use_reentrant=False, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, block), **named)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the forward pass and its repetition run in: the latter with the buffers as they are now."""
    before = [
        (module._buffers, name, buffer.clone())
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    return nullcontext(), _exchanged(before)


@contextmanager
def _exchanged(entries: Sequence[tuple[dict[str, Tensor | None], str, Tensor | None]]) -> Iterator[None]:
    """Inside, dicts of tensors have these values, which may be changed; afterwards their own again, as they were."""
    own = [place[name] for place, name, _ in entries]
    for place, name, value in entries:
        place[name] = value
    try:
        yield
    finally:
        for (place, name, _), value in zip(entries, own, strict=True):
            place[name] = value
