"""Lesson 8: lesson 7's work under toolkit.

The job is jobs/tour/lesson_8.yaml. It names the network of lesson 7, the data, the batch, the optimizer and the epochs.
toolkit does the rest: it starts the ranks, shares out the samples, runs the loop, reports and saves.
Run this from the project's root, after lesson 7: python jobs/tour/lesson_8_toolkit.py
"""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

from toolkit import Run

# One thread a rank, as in lesson 7. More threads may add up a sum in another order, and so round it otherwise.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def toolkit(*words):
    print("   $ toolkit", *words, flush=True)
    subprocess.run([sys.executable, "-m", "toolkit", *words], env=ONE_THREAD, check=True)


if not os.path.exists("runs/lesson_7.pt"):
    sys.exit("runs/lesson_7.pt, which this lesson compares with, is not there; run lesson 7 first")

print("1. This trains on two ranks. The second time it says that the run is complete.")
toolkit("train", "jobs/tour/lesson_8.yaml", "--processes", "2")

print("2. A run is a folder. It holds the job, the metrics, the state, the logs and the checkpoints.")
run = Run("runs/lesson_8")
print("  ", *sorted(os.listdir(run.url)))
assert run.status()["state"] == "completed"

print("3. This takes the weights out of the last checkpoint.")
toolkit("checkpoints", run.url, "export", "--checkpoint", "last", "--to", "runs/lesson_8.safetensors")

print("4. They are the weights of lesson 7, bit for bit.")
by_hand = torch.load("runs/lesson_7.pt", weights_only=True)
by_toolkit = load_file("runs/lesson_8.safetensors")
assert by_hand.keys() == by_toolkit.keys()
for name, weight in by_hand.items():
    print(f"   {name:8} of {weight.numel():4} numbers: at most {(weight - by_toolkit[name]).abs().max().item()} apart")
    assert torch.equal(weight, by_toolkit[name])

print("\nWith toolkit: toolkit train jobs/tour/lesson_8.yaml --processes 2")
print("Read next: toolkit/session.py")
