"""One rank of a world that takes the same steps under DDP and under FSDP2; tests/dist/test_fsdp.py starts it.

    torchrun … tests/dist/sharded.py

Rank 0 prints, by case, the largest differences of loss, gradient norm, evaluation and weights over all steps.
"""
# ruff: noqa: E402 - a script finds what it shares with the tests only once it has said where that is

import json
import os
import sys
import warnings
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from toolkit import session
from toolkit.checkpoint.state import model_tensors
from toolkit.config import load_job
from toolkit.datasets.loader import batches
from toolkit.distributed import ranks_from
from toolkit.observers.averaging import Averaging

STEPS = 12
GPT = [
    "jobs/char_gpt.yaml", "train.max_steps=100", "model.args.layers=2", "model.args.width=32",
    "data.global_batch_size=12", "data.train.args.context=16", "data.val.args.context=16", "model.args.dropout=0.1",
    "schedule.args.warmup_steps=0", "eval.batch_size=300",
]  # fmt: skip
CNN = [
    "jobs/digits_cnn.yaml", "train.max_steps=100", "model.args.width=8", "schedule.args.warmup_steps=0",
    "optimizer.args.eps=1e-5",
]  # fmt: skip
# Without Adam: what makes a whole step of a gradient near 0 magnifies rounding, a thousandfold in batch norms over so
# few values.
MODEL = [
    *CNN[:2], CNN[3], "optimizer={name: sgd, args: {lr: 0.02, momentum: 0.9}}", "train.activation_checkpointing=true",
]  # fmt: skip
CASES = {
    "clipped": [*GPT, "train.clip_grad_norm=0.05"],
    "spikes are skipped": [*GPT, "train.on_nan=skip", "train.spike_grad_norm=1.8"],
    "accumulated": [*GPT, "train.micro_batch_size=2"],
    # At 2 and 4 ranks, one takes one more.
    "uneven": [*GPT, "model.args.dropout=0.0", "data.global_batch_size=13", "train.micro_batch_size=3"],
    "token weights": [*GPT, "task={name: language_modeling, args: {ignore_index: 3}}", "train.micro_batch_size=2"],
    "frozen, averaged": [*GPT, "train.freeze=[blocks.0.*, tokens.*]", "train.ema_decay=0.5"],
    "tied blocks": [*GPT, "model={name: sharded:Tied}"],
    "batch norm": CNN,
    "sgd": [*CNN[:-1], "optimizer={name: sgd, args: {lr: 0.05, momentum: 0.9}}"],
    "recomputed": [*CNN, "train.activation_checkpointing=true"],
    "resnet, recomputed": [*MODEL, "model={name: resnet, args: {stem: cifar, width: 4}}"],
    "vit, recomputed": [*MODEL, "model={name: vit, args: {patch: 2, layers: 2, width: 24}}"],
    "bf16": [*GPT, "train.precision=bf16"],
    "bf16, batch norm": [*CNN, "train.precision=bf16"],
}


class Tied(nn.Module):
    """Blocks of which two share a weight, an odd number of features, a scale no rank can share, and a hidden buffer
    that goes into the output and changes by rank.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 15)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(15, 15), nn.Tanh()) for _ in range(3))
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.rand(15), persistent=False)
        self.head = nn.Linear(15, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        stream = self.embedding(tokens) + self.shift
        if self.training:
            self.shift.lerp_(stream.detach().mean((0, 1)), 0.5)
        for block in self.blocks:
            stream = stream + self.scale * block(stream)
        return self.head(stream)


def taken(words: list[str]) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """What STEPS steps and two evaluations show, and the weights they end with."""
    job = load_job(words[0], words[1:])
    parts = session.build(job, ranks_from(os.environ), torch.device("cpu"))
    trainer, found = parts.trainer, dict[str, list[float]](losses=[], norms=[], evaluation=[])
    assert isinstance(trainer.model, FSDPModule) == ("train.strategy=fsdp" in words)
    feed = batches(parts.steps, 0, STEPS, 0, trainer.device)
    for step, micro_batches in enumerate(feed):
        trainer.step(micro_batches)
        if trainer.state.ema:
            Averaging().after_step(trainer)
        loss = trainer.mean_loss()
        found["losses"].append(loss if isfinite(loss) else 0.0)  # all that there was has been skipped
        found["norms"] += map(float, trainer.interval.norms)
        trainer.interval.restart()
        if step % 6 == 5:
            assert parts.val
            found["evaluation"] += trainer.evaluate(batches(parts.val, 0, len(parts.val), 0, trainer.device)).values()
    assert (0 < found["losses"].count(0.0) < STEPS) == ("train.on_nan=skip" in words)
    return found, {name: whole(tensor) for name, tensor in model_tensors(trainer.state.model).items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compared(words: list[str], change: str = "train.strategy=fsdp") -> dict[str, float]:
    (ours, weights), (ddp, expected) = taken([*words, change]), taken(words)
    differences = {what: max(abs(a - b) for a, b in zip(ours[what], ddp[what], strict=True)) for what in ddp}
    assert weights.keys() == expected.keys()
    differences["weights"] = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    return differences


def main() -> None:
    dist.init_process_group("gloo")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views: nobody writes into them here
    os.chdir(ROOT)
    everything: dict[str, Any] = {name: compared(words) for name, words in CASES.items()}
    everything["bf16 gradients"] = compared(GPT, "train.grad_compression=bf16")
    if dist.get_rank() == 0:
        print(json.dumps(everything), flush=True)
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts while it is torn down, and the figures are already out


if __name__ == "__main__":
    main()
