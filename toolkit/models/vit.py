"""The vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929)."""

import torch
from torch import Tensor, nn

from toolkit.errors import JobError
from toolkit.models.gpt import Block, initialise


class Vit(nn.Module):
    """(B, C, H, W) -> (B, num_classes), H and W as in `input_shape` and multiples of `patch`.

    An image becomes a row of patches of `patch` x `patch` pixels, a class token before them, each with a learned
    position; then pre-norm blocks as in GPT, but every place sees every other; the class token's end is what the head
    reads. As it stands it is Ti/16. S/16 has 6 heads and width 384, B/16 has 12 and 768, L/16 has 24 layers, 16 heads
    and width 1024. For CIFAR's images of 32 pixels, patch 4.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        patch: int = 16,
        layers: int = 12,
        heads: int = 3,
        width: int = 192,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        if width % heads:
            raise JobError(f"width {width} is not a multiple of heads {heads}; choose one that is")
        if height % patch or breadth % patch:
            raise JobError(
                f"images of {height}x{breadth} are not whole patches of {patch}x{patch}; give one that divides both"
            )
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (height // patch) * (breadth // patch), width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(initialise)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = self.patches(inputs).flatten(2).transpose(1, 2)  # (B, patches, width)
        stream = torch.cat([self.token.expand(len(inputs), -1, -1), patches], 1)
        stream = self.dropout(stream + self.positions)
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream[:, 0]))
