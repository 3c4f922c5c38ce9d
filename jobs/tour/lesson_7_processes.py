"""Lesson 7: several processes train one model.

Each process is called a rank. It has the whole model and its own part of each batch. In backward() the ranks average
their gradients. So all take the same step, and their models stay the same.
Run this from the project's root: python jobs/tour/lesson_7_processes.py
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from toolkit import ElasticDistributedSampler
from toolkit.datasets.digits import Digits


def network():
    torch.manual_seed(0)  # the same first weights on every rank
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train(sampler):
    """The loop of lesson 5. A batch has 32 samples: 16 on each of 2 ranks."""
    loader = DataLoader(sampler.dataset, batch_size=16, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for epoch in range(5):
        sampler.set_epoch(epoch)  # another order in each epoch, the same on all ranks
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # here the ranks average their gradients
            optimizer.step()
    weights = [None, None]
    dist.all_gather_object(weights, [parameter.tolist() for parameter in model.parameters()])
    assert weights[0] == weights[1]
    return model.module


def on_each_rank():
    dist.init_process_group("gloo")  # meet the others; gloo is for CPUs, nccl for GPUs
    print(f"3. Rank {dist.get_rank()} of {dist.get_world_size()} is process {os.getpid()}", flush=True)
    say = print if dist.get_rank() == 0 else lambda words: None  # or each line would come twice
    digits, test = Digits("train"), Digits("test")
    sampler, shares = DistributedSampler(digits), [None, None]
    dist.all_gather_object(shares, list(sampler))
    say(f"4. DistributedSampler gives each rank other samples: {shares[0][:4]}... and {shares[1][:4]}...")
    assert sorted(shares[0] + shares[1]) == list(range(len(digits)))  # both together have each sample once
    say("5. DistributedDataParallel, or DDP, averages gradients. toolkit's sampler fits too; its order is another one.")
    for each in (sampler, ElasticDistributedSampler(digits, global_batch_size=32)):
        model = train(each)
        accuracy = (model(test.inputs).argmax(1) == test.targets).float().mean().item()
        say(f"   {type(each).__name__}: both ranks have the same weights, test accuracy {accuracy:.4f}")
        assert accuracy > 0.9
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "runs/lesson_7.pt")  # for lesson 8
    sys.stdout.flush()
    os._exit(0)  # leave by ending: while Python itself tidies up, a thread of gloo may be at work, and abort it


if __name__ == "__main__" and "RANK" in os.environ:
    on_each_rank()
elif __name__ == "__main__":
    print("1. A notebook is one process without a rank. It has nobody to meet, so this cannot work in it:")
    try:
        dist.init_process_group("gloo")
    except ValueError as error:
        print("  ", error)
    assert not dist.is_initialized()
    print("2. torchrun starts the processes and tells each its rank: torchrun --nproc-per-node 2 FILE", flush=True)
    os.makedirs("runs", exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    print("\nWith toolkit: toolkit train jobs/tour/lesson_8.yaml --processes 2")
    print("Read next: toolkit/datasets/sampler.py")
