"""Residual networks (He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", arXiv:1512.03385)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Blocks in each of the four stages: the paper's Table 1.
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNet(nn.Module):
    """(B, C, H, W) -> (B, num_classes).

    Four stages of blocks of `width`, 2, 4 and 8 `width` channels; each but the first halves the size. Before them, the
    stem `imagenet` quarters it, by a 7x7 convolution and a pooling, for images of about 224 pixels; the stem `cifar`
    keeps it, by a 3x3 convolution, for images of about 32. Depths 18 and 34 are of blocks with two 3x3 convolutions, 50
    is of bottlenecks.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        depth: Literal[18, 34, 50] = 18,
        stem: Literal["cifar", "imagenet"] = "imagenet",
        width: int = 64,
    ) -> None:
        super().__init__()
        if stem == "cifar":
            self.stem = nn.Sequential(*_layer(input_shape[0], width, 3), nn.ReLU())
        else:
            self.stem = nn.Sequential(*_layer(input_shape[0], width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        self.blocks, channels = nn.ModuleList(), width
        for stage, count in enumerate(STAGES[depth]):
            for place in range(count):
                halves = stage > 0 and place == 0
                block = Block(channels, width * 2**stage, stride=2 if halves else 1, bottleneck=depth == 50)
                self.blocks.append(block)
                channels = block.outputs
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                module.begin_as_the_identity()
        # Channels last is a fifth faster on a CPU and what tensor cores want.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            features = block(features)
        return self.head(features.mean((2, 3)))


class Block(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride): what its layers make of the input, and the input.

    A bottleneck goes down to `width` channels and up to four times as many, with its stride in the 3x3 convolution
    ("ResNet v1.5"); else there are `width` channels throughout.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.outputs = 4 * width if bottleneck else width
        self.layers = nn.Sequential(
            *([*_layer(inputs, width, 1), nn.ReLU()] if bottleneck else []),
            *_layer(width if bottleneck else inputs, width, 3, stride),
            nn.ReLU(),
            *_layer(width, self.outputs, 1 if bottleneck else 3),
        )
        changes = stride > 1 or inputs != self.outputs
        self.shortcut = nn.Sequential(*_layer(inputs, self.outputs, 1, stride)) if changes else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.layers(inputs) + self.shortcut(inputs))

    def begin_as_the_identity(self) -> None:
        """Scale the last norm by 0 (Goyal et al., arXiv:1706.02677)."""
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]


def _layer(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]
