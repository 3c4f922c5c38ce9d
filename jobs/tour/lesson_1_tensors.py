"""Lesson 1: tensors.

A tensor is a table of numbers with any number of dimensions. All that PyTorch computes with are tensors.
Run this from the project's root: python jobs/tour/lesson_1_tensors.py
"""

import numpy as np
import torch

from toolkit.datasets.digits import Digits

print("1. A tensor can be made from a list. It has a shape and a type.")
labels = torch.tensor([1, 2, 3])
table = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
print("  ", labels.tolist(), tuple(labels.shape), labels.dtype)
print("  ", table.tolist(), tuple(table.shape), table.dtype)
# Whole numbers become int64, the type of class labels. Others become float32, the type of inputs and weights.
assert labels.dtype == torch.int64
assert table.dtype == torch.float32
assert labels.shape == (3,)
assert table.shape == (2, 3)

print("2. A tensor can be made from a NumPy array. Both share one memory.")
array = np.zeros(3)
shared = torch.from_numpy(array)
array[0] = 7
print("  ", array, "->", shared.tolist(), shared.dtype)
assert shared[0] == 7
# NumPy makes float64 where PyTorch makes float32. A network wants float32, so convert.
assert shared.dtype == torch.float64
assert shared.float().dtype == torch.float32

print("3. reshape keeps the numbers in their order and gives them another shape.")
print("  ", table.reshape(3, 2).tolist())
assert table.reshape(3, 2).tolist() == [[1, 2], [3, 4], [5, 6]]
# One size may be -1: PyTorch works it out.
assert table.reshape(-1).shape == (6,)

print("4. transpose swaps two dimensions: rows become columns.")
print("  ", table.transpose(0, 1).tolist())
assert table.transpose(0, 1).tolist() == [[1, 4], [2, 5], [3, 6]]

print("5. matmul, written @, multiplies matrices: each row on the left with each column on the right.")
product = table @ table.transpose(0, 1)
print("  ", product.tolist())
assert product.shape == (2, 2)
assert product[0, 1] == 1 * 4 + 2 * 5 + 3 * 6
# The inner sizes must be equal: (2, 3) @ (2, 3) is an error.
try:
    table @ table
except RuntimeError as error:
    print("  ", error)
else:
    raise AssertionError("matrices of the wrong sizes were multiplied")

print("6. Indexing takes a part: a row, a column, one number, or all numbers for which something is true.")
print("  ", table[0].tolist(), table[:, 0].tolist(), table[1, 2].item(), table[table > 3].tolist())
assert table[0].tolist() == [1, 2, 3]
assert table[:, 0].tolist() == [1, 4]
assert table[1, 2].item() == 6
assert table[table > 3].tolist() == [4, 5, 6]

print("7. A tensor lies on a device: the processor (cpu) or a graphics card (cuda). Lesson 6 has more.")
print("  ", table.device)
assert table.device == torch.device("cpu")

print("8. A batch of images is a tensor too: here 4 images, 1 colour, 8 rows, 8 columns. This is one of them.")
images, labels = Digits().gather(np.arange(4))
assert images.shape == (4, 1, 8, 8)
assert images.dtype == torch.float32
assert labels.dtype == torch.int64
for row in images[3, 0]:
    print("  ", "".join(2 * " .:*#"[int(4 * grey)] for grey in row))
print("   It shows a", labels[3].item())

print("\nWith toolkit: images, labels = Digits().gather(np.arange(4))")
print("Read next: toolkit/datasets/digits.py")
