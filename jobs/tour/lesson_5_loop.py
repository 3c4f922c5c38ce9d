"""Lesson 5: the loop, by hand.

Training is a loop: take a batch, compute the loss, find the gradient, take a step.
Run this from the project's root: python jobs/tour/lesson_5_loop.py
"""

from math import log

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from toolkit.datasets.digits import Digits

torch.manual_seed(0)  # the same random numbers in each run
train_loader = DataLoader(Digits("train"), batch_size=32, shuffle=True)
test_loader = DataLoader(Digits("test"), batch_size=359)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def evaluate(loader):
    """The mean loss and the accuracy: which part of the samples gets its highest score for the right class."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():  # no gradient is wanted here, so no graph is kept
        for images, labels in loader:
            scores = model(images)
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            right += (scores.argmax(1) == labels).sum().item()
            count += len(labels)
    return loss / count, right / count


print("1. A model has two modes. In train mode, dropout sets random numbers to 0. In eval mode it does nothing.")
images, labels = next(iter(test_loader))
model.train()
assert not torch.equal(model(images), model(images))
model.eval()
assert torch.equal(model(images), model(images))

print("2. The loss is the cross-entropy: how little the model believes in the right class.")
first_loss, first_accuracy = evaluate(test_loader)
print(f"   Before training: test loss {first_loss:.2f}, test accuracy {first_accuracy:.2f}")
# Who guesses among 10 classes has a loss of log(10) = 2.30 and is right once in 10 times.
assert abs(first_loss - log(10)) < 0.1
assert first_accuracy < 0.3

print("3. This is the loop.")
for epoch in range(10):
    model.train()
    for images, labels in train_loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()  # or the new gradient would be added to the old one
        loss.backward()
        optimizer.step()
    if epoch % 5 == 4:
        test_loss, accuracy = evaluate(test_loader)
        print(f"   epoch {epoch + 1:2}: test loss {test_loss:.2f}, test accuracy {accuracy:.2f}")
assert test_loss < 0.4
assert accuracy > 0.9

print("4. A step is no magic: SGD takes from each weight the learning rate times its gradient.")
weight = model[1].weight
expected = weight.detach() - 0.1 * weight.grad
optimizer.step()
assert torch.allclose(weight, expected, atol=1e-6)

print("5. The test images were never trained on. So the accuracy says what the model does with new images.")

print("\nWith toolkit: toolkit train jobs/digits_mlp.yaml train.epochs=10 run.dir=runs/lesson_5")
print("Read next: toolkit/trainer.py")
