"""A decoder-only transformer: GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.errors import JobError


class Gpt(nn.Module):
    """(B, T) int64 tokens -> (B, T, vocab_size) logits, T at most `input_shape[0]`.

    Pre-norm blocks, learned positions, the output layer's weight tied to the embedding's. Initialisation as in GPT-2:
    normal with standard deviation 0.02, and 0.02 / sqrt(2 layers) for the two projections a block that write into the
    residual stream.
    """

    def __init__(
        self,
        vocab_size: int,
        input_shape: tuple[int],
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise JobError(f"width {width} is not a multiple of heads {heads}; choose one that is")
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(input_shape[0], width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, vocab_size, bias=False)
        self.logits.weight = self.tokens.weight
        self.apply(initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                nn.init.normal_(parameter, std=0.02 / sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        stream = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            stream = block(stream)
        return self.logits(self.norm(stream))


class Block(nn.Module):
    """(B, T, width) -> (B, T, width): attention, then a feed-forward network, each added to the stream."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(self.attention_norm(stream))
        return stream + self.feed_forward(self.feed_forward_norm(stream))


class Attention(nn.Module):
    """Self-attention over `heads` heads (Vaswani et al., arXiv:1706.03762). (B, T, width) -> (B, T, width).

    If it is causal, a place sees only itself and those before it.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.p, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, width = stream.shape
        qkv = self.qkv(stream).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=self.causal)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class FeedForward(nn.Module):
    """width -> 4 width -> width with GELU (its tanh form, as in GPT-2)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.into = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        return self.dropout(self.out(F.gelu(self.into(stream), approximate="tanh")))


def initialise(module: nn.Module) -> None:
    """Weights normal with standard deviation 0.02, biases 0."""
    if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
