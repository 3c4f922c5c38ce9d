"""A multilayer perceptron (Rumelhart, Hinton and Williams, Nature 323, 1986)."""

from itertools import pairwise
from math import prod

from torch import Tensor, nn


class Mlp(nn.Module):
    """(B, *input_shape) -> (B, num_classes): linear layers with ReLU between them, dropout after each.

    `num_classes` is the number of outputs; for a regression, the number of values.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...] = (64,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = (prod(input_shape), *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()] + [nn.Dropout(dropout)] * (dropout > 0)
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
