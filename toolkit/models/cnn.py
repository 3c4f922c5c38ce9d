"""A small convolutional network of four 3x3 layers in two scales, in the manner of VGG (Simonyan and Zisserman,
arXiv:1409.1556) with batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) and global average pooling (Lin, Chen
and Yan, arXiv:1312.4400).
"""

import torch
from torch import Tensor, nn


class Cnn(nn.Module):
    """(B, C, H, W) -> (B, num_classes), H and W at least 4.

    Layers of `width`, `width`, 2 `width` and 2 `width` channels; the size is halved after the first and the third.
    About 64 `width`^2 parameters: 83 thousand at 36. `norm: false` leaves out batch normalisation, so that a sample's
    output depends on that sample alone.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 32,
        dropout: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_layer(input_shape[0], width, norm),
            nn.MaxPool2d(2),
            *_layer(width, width, norm),
            *_layer(width, 2 * width, norm),
            nn.MaxPool2d(2),
            *_layer(2 * width, 2 * width, norm),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, num_classes),
        )
        # Channels last is a fifth faster on a CPU and what tensor cores want.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs.contiguous(memory_format=torch.channels_last))


def _layer(inputs: int, outputs: int, norm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not norm)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [convolution, nn.ReLU()]
