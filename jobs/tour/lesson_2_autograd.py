"""Lesson 2: autograd, or how PyTorch finds gradients.

To learn is to make a number smaller, the loss, by changing other numbers, the weights. The gradient says how: it
is the slope of the loss for each weight.
Run this from the project's root: python jobs/tour/lesson_2_autograd.py
"""

import torch

from toolkit.tasks import Regression

print("1. We have inputs x and targets y. The prediction is w * x, the loss is the mean squared error.")
x = torch.tensor([1.0, 2.0, 3.0])
y = torch.tensor([2.0, 4.0, 6.0])


def loss_at(weight):
    return ((weight * x - y) ** 2).mean()


print(f"   At w = 3 the loss is {loss_at(3.0):.4f}, at w = 2 it is {loss_at(2.0):.4f}")
assert loss_at(2.0) == 0

print("2. requires_grad=True says: I want the gradient of this one.")
w = torch.tensor(3.0, requires_grad=True)
loss = loss_at(w)
assert loss.requires_grad  # whatever is computed from w
assert not x.requires_grad

print("3. PyTorch has written down every operation on the way from w to the loss. That is the graph.")
node, names = loss.grad_fn, []
while node is not None:
    names.append(node.name().split(":")[-1])
    node = node.next_functions[0][0] if node.next_functions else None
print("  ", " <- ".join(names))
# Read from the left, it goes back from the loss: mean, square, minus, times, and at the end w itself.
assert names == ["MeanBackward0", "PowBackward0", "SubBackward0", "MulBackward0", "AccumulateGrad"]

print("4. backward() walks the graph from the loss to w. It leaves the gradient in w.grad.")
assert w.grad is None
loss.backward()
print(f"   w.grad is {w.grad:.4f}")

print("5. Is it right? Move w a little to both sides and look how much the loss changes: a finite difference.")
little = 0.01
slope = (loss_at(3.0 + little) - loss_at(3.0 - little)) / (2 * little)
print(f"   The finite difference is {slope:.4f}")
assert abs(w.grad - slope) < 1e-3

print("6. A second backward() adds to w.grad. So a training loop sets it back before each step.")
once = w.grad.clone()
loss_at(w).backward()
print(f"   w.grad is {w.grad:.4f}")
assert torch.equal(w.grad, 2 * once)
w.grad = None

print("7. A step against the gradient makes the loss smaller. Many steps find the best w.")
for _ in range(20):
    loss_at(w).backward()
    with torch.no_grad():  # the step itself is no part of the graph
        w -= 0.05 * w.grad
    w.grad = None
print(f"   After 20 steps w is {w:.4f} and the loss {loss_at(w):.6f}")
assert abs(w - 2) < 1e-3

print("8. toolkit has the loss as a task. It gives one loss a sample. backward() is the same.")
w = torch.tensor(3.0, requires_grad=True)
Regression().loss(w * x, y).mean().backward()
print(f"   w.grad is {w.grad:.4f}")
assert torch.equal(w.grad, once)

print("\nWith toolkit: Regression().loss(w * x, y).mean().backward()")
print("Read next: toolkit/tasks.py")
