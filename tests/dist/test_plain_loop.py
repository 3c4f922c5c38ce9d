"""The sampler and the checkpointer in somebody else's DDP loop: begun on two ranks, ended on one."""

import torch

from tests.conftest import tensors_of
from tests.dist.conftest import Stage

LOOP = """
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from toolkit import Checkpointer, ElasticDistributedSampler
from toolkit.datasets.digits import Digits

url, last = sys.argv[1], int(sys.argv[2])
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
state = SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), step=0)
sampler = ElasticDistributedSampler(Digits(), global_batch_size=32)
checkpointer = Checkpointer(url)
checkpointer.resume(state)
sampler.set_step(state.step)
wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
for inputs, targets in DataLoader(Digits(), sampler.batch_size, sampler=sampler):
    torch.nn.functional.cross_entropy(wrapped(inputs), targets).backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    if state.step == last:
        break
checkpointer.save(state)
checkpointer.wait()
assert checkpointer.failure is None
os._exit(0)  # gloo sometimes aborts while it is torn down
"""


def test_a_loop_that_was_begun_on_two_ranks_ends_on_one_as_if_it_had_been_one(stage: Stage) -> None:
    stage.place.write("loop.py", LOOP)
    for run, parts in {"whole": [(1, 20)], "parted": [(2, 10), (1, 20)]}.items():
        for processes, last in parts:
            stage.program(processes, "loop.py", f"runs/{run}/checkpoints", str(last))
    whole, parted = (tensors_of(str(stage.folder / f"runs/{run}"), 20) for run in ("whole", "parted"))
    assert len(whole) == 4, "two weights and their momenta"
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, rtol=1e-5, atol=1e-6)
