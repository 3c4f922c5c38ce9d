"""Lesson 6: the device.

A tensor lies in the memory of a device: the processor (CPU) or a graphics processor (GPU). A GPU does many simple
operations at once. What the lesson says of GPUs it shows only where there is one, and else it says so.
Run this from the project's root: python jobs/tour/lesson_6_device.py
"""

import time

import torch
from torch import nn

from toolkit.distributed import ALONE, choose_device

print("1. Which device is there? A GPU if PyTorch finds one, else the CPU.")
gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
device = gpu or torch.device("cpu")
print("  ", f"This machine has a GPU: {gpu}." if gpu else "This machine has no GPU that PyTorch can use.")

print("2. .to(device) copies a tensor there. The numbers stay the same. A model moves with all its weights.")
numbers = torch.arange(3.0)
moved = numbers.to(device)
model = nn.Linear(3, 2).to(device)
print("  ", numbers.device, "->", moved.device)
assert moved.device.type == device.type
assert moved.tolist() == numbers.tolist()
assert all(parameter.device.type == device.type for parameter in model.parameters())
assert model(moved).device.type == device.type  # the result lies where it was computed

print("3. Two tensors must lie on the same device. Else there is an error.")
if not gpu:
    print("   Without a GPU the second device is `meta`. Its tensors have a shape but no numbers.")
elsewhere = numbers.to(gpu or "meta")
try:
    numbers + elsewhere
except RuntimeError as error:
    print("  ", str(error).splitlines()[0])
else:
    raise AssertionError("tensors on two devices were added")
# So a training loop moves each batch to where the model is.


def multiply_s(size, where):
    """The seconds that it takes to multiply two square matrices, the best of 5, and their product."""
    torch.manual_seed(0)
    left, right = torch.rand(size, size).to(where), torch.rand(size, size).to(where)
    times = []
    for _ in range(6):  # the first is slower: memory is taken and programs are loaded
        started_s = time.perf_counter()
        product = left @ right
        if where.type != "cpu":
            torch.accelerator.synchronize()  # a GPU works on while Python goes on: wait for the result
        times.append(time.perf_counter() - started_s)
    return min(times[1:]), product


print("4. How long does it take to multiply two matrices?")
cpu = torch.device("cpu")
cpu_s = {size: multiply_s(size, cpu)[0] for size in (64, 512, 2048)}
for size, elapsed_s in cpu_s.items():
    print(f"   CPU, {size:4} x {size:4}: {1000 * elapsed_s:9.3f} ms")
assert cpu_s[2048] > 4 * cpu_s[512]  # 4 times the size is 64 times the work
if gpu:
    gpu_s = {size: multiply_s(size, gpu)[0] for size in cpu_s}
    for size, elapsed_s in gpu_s.items():
        print(f"   GPU, {size:4} x {size:4}: {1000 * elapsed_s:9.3f} ms, {cpu_s[size] / elapsed_s:.1f} times as fast")
    assert gpu_s[2048] < cpu_s[2048]  # worth it for large matrices; for small ones it may not be
    assert torch.allclose(multiply_s(512, cpu)[1], multiply_s(512, gpu)[1].cpu(), rtol=1e-3)  # rounded otherwise
else:
    print("   No GPU, so there is nothing to compare with. Run this lesson again on a machine that has one.")

chosen = choose_device("auto", ALONE)
assert chosen.type == device.type

print('\nWith toolkit: chosen = choose_device("auto", ALONE)')
print("Read next: toolkit/distributed.py")
