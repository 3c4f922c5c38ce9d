"""One rank of a world that writes or reads a checkpoint of a sharded model; tests/dist/test_shards.py starts it.

torchrun … tests/dist/shards.py write|read fsdp|plain FOLDER
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.states import shared
from toolkit.checkpoint import Archive, Checkpointer
from toolkit.checkpoint.state import to_plain
from toolkit.distributed import ranks_from
from toolkit.trainer import State


def build(strategy: str) -> State:
    """Layers whose sides no number of ranks divides: of some tensors the last rank holds nothing."""
    torch.manual_seed(0)
    sizes = [7, 10, 5, 3]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b)) for a, b in pairwise(sizes)))
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def trained(state: State) -> None:
    for _ in range(2):
        state.optimizer.zero_grad()
        state.model(torch.randn(8, 7, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        state.optimizer.step()
        state.step += 1


def whole(state: State) -> dict[str, Tensor]:
    tensors, _ = to_plain(state)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def main(action: str, strategy: str, folder: str) -> None:
    dist.init_process_group("gloo")
    state, ranks = build(strategy), ranks_from(os.environ)
    checkpointer = Checkpointer(Archive(f"{folder}/checkpoints"), ranks, 1)
    if action == "write":
        trained(state)
        checkpointer.save(state)
        checkpointer.wait()
        assert checkpointer.failure is None, checkpointer.failure
        dist.barrier()
        tensors = whole(state)
        if ranks.leads:
            save_file(tensors, f"{folder}/expected.safetensors")
    else:
        assert checkpointer.resume(state) == 2
        found, expected = whole(state), load_file(f"{folder}/expected.safetensors")
        assert found.keys() == expected.keys()
        differ = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differ, f"rank {ranks.rank}: {differ}"
        trained(state)  # the optimizer can go on with what it was given
    if ranks.leads:
        writers = {name.split(".")[2] for name in Archive(f"{folder}/checkpoints").whole(2).files if "data" in name}
        print(json.dumps({"tensors": len(to_plain(state)[0]), "writers": len(writers)}), flush=True)
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts while it is torn down, and what is asserted has been


if __name__ == "__main__":
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        shared(patch)
        main(*sys.argv[1:])
