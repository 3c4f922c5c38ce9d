"""Windows of a text for next-token prediction."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from toolkit import storage
from toolkit.datasets.stream import Int64s
from toolkit.errors import JobError


class Text(Dataset[Any]):
    """Inputs (context,) int64 tokens, targets (context,): the same shifted by one.

    `path`: a UTF-8 file, by path or URL. `unit`: a token is a character (vocabulary: those of the whole file, sorted)
    or a byte (256). Window i starts at token i * `stride` (default: `context`, so that windows do not overlap). `val`
    is the last `val_fraction` of the text, `train` what is before it, `all` the whole.
    """

    def __init__(
        self,
        path: str,
        split: Literal["train", "val", "all"] = "train",
        context: int = 128,
        stride: int | None = None,
        unit: Literal["characters", "bytes"] = "characters",
        val_fraction: float = 0.1,
    ) -> None:
        if context < 1 or (stride is not None and stride < 1) or not 0 < val_fraction < 1:
            raise JobError(
                f"context {context} and stride {stride} must be at least 1, val_fraction {val_fraction} between 0 and 1"
            )
        self.source, self.context, self.stride = storage.shown(path), context, stride or context
        tokens, self.alphabet = _tokens(path, unit)
        self.vocab_size = len(self.alphabet) if self.alphabet else 256
        self.input_shape = (context,)
        cut = len(tokens) - round(len(tokens) * val_fraction)
        self.tokens = {"train": tokens[:cut], "val": tokens[cut:], "all": tokens}[split]
        if len(self.tokens) <= context:
            raise JobError(
                f"{self.source}: {split} has {len(self.tokens)} tokens; a window needs {context + 1}: "
                "use a longer text or a shorter context"
            )
        self.window = np.arange(context + 1)

    def __len__(self) -> int:
        return (len(self.tokens) - self.context - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(np.array([range(len(self))[index]]))
        return inputs[0], targets[0]

    def gather(self, indices: Int64s) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(self.tokens[indices[:, None] * self.stride + self.window].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def decode(self, tokens: Tensor) -> str:
        """The text of a row of tokens."""
        values = tokens.tolist()
        return "".join(self.alphabet[t] for t in values) if self.alphabet else bytes(values).decode(errors="replace")


def _tokens(path: str, unit: str) -> tuple[Any, str]:
    """(the token of each unit of the text, the characters that tokens stand for: none for bytes)."""
    try:
        content = storage.read(path)
    except (OSError, ValueError) as error:
        raise JobError(
            f"text {storage.shown(path)} cannot be read ({type(error).__name__}); give a file or URL that exists"
        ) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JobError(
            f"text {storage.shown(path)} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); "
            "convert it to UTF-8"
        ) from error
    if unit == "bytes":
        return np.frombuffer(content, np.uint8), ""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, tokens = np.unique(points, return_inverse=True)
    return tokens.astype(np.uint32), "".join(map(chr, alphabet.tolist()))
