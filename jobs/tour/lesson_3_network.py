"""Lesson 3: a network.

A network is a function with weights. In PyTorch it is a Module. Modules are made of other modules.
Run this from the project's root: python jobs/tour/lesson_3_network.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from toolkit.models.mlp import Mlp

print("1. A Linear layer multiplies by a matrix of weights and adds a bias.")
layer = nn.Linear(64, 10)
inputs = torch.rand(5, 64)  # 5 samples of 64 numbers
by_hand = inputs @ layer.weight.T + layer.bias
print("  ", tuple(inputs.shape), "->", tuple(layer(inputs).shape))
assert torch.allclose(layer(inputs), by_hand, atol=1e-6)

print("2. A Module has its parts in __init__ and says in forward what happens to the input.")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, images):
        flat = images.flatten(1)  # an image of 1x8x8 becomes 64 numbers
        return self.output(self.hidden(flat).relu())  # relu makes negative numbers 0


net = Net()
images = torch.rand(5, 1, 8, 8)
print("  ", tuple(images.shape), "->", tuple(net(images).shape))
assert net(images).shape == (5, 10)  # for each image a score for each of 10 classes

print("3. Where one part simply follows another, Sequential says the same in fewer words.")
sequential = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
assert sequential(images).shape == (5, 10)

print("4. The weights are the module's parameters. Each has a name and wants a gradient.")
for name, parameter in net.named_parameters():
    print(f"   {name:14} {tuple(parameter.shape)!s:10} {parameter.numel():5}")
    assert parameter.requires_grad
count = sum(parameter.numel() for parameter in net.parameters())
print("   All together:", count)
assert count == (64 * 32 + 32) + (32 * 10 + 10)

print("5. state_dict() is all of them by name. It can be saved to a file and loaded into another network.")
other = Net()
assert not torch.equal(net(images), other(images))  # it begins with other random weights
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "net.pt")
    torch.save(net.state_dict(), path)
    print("  ", path.name, "has", path.stat().st_size, "bytes")
    other.load_state_dict(torch.load(path, weights_only=True))  # tensors only, no code from the file
assert torch.equal(net(images), other(images))

print("6. The names must fit. Sequential counts its parts, so its names are others.")
try:
    sequential.load_state_dict(net.state_dict())
except RuntimeError as error:
    print("  ", str(error).splitlines()[1].strip())
else:
    raise AssertionError("weights with the wrong names were loaded")

model = Mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(32,))
assert sum(parameter.numel() for parameter in model.parameters()) == count
assert model(images).shape == (5, 10)

print("\nWith toolkit: model = Mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(32,))")
print("Read next: toolkit/models/mlp.py")
