"""Channels last: where the weights and inputs lie, that nothing else changes, and where it cannot be had."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import DIGITS, Workplace
from toolkit import session
from toolkit.config import load_job
from toolkit.distributed import ALONE
from toolkit.errors import JobError
from toolkit.layout import placed

CPU = torch.device("cpu")


class Net(nn.Module):
    """Says in `seen` how its input lies."""

    def __init__(self, input_shape: tuple[int, int, int] = (3, 8, 8), num_classes: int = 4) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(input_shape[0], 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, num_classes)
        self.seen: list[bool] = []

    def forward(self, inputs: Tensor, extra: Any = None) -> Tensor:
        self.seen.append(lies_last(inputs))
        found: Tensor = self.head(self.norm(self.convolution(inputs)).relu().mean((2, 3)))
        return found


def lies_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def made(channels_last: bool) -> Net:
    torch.manual_seed(0)
    model = placed(Net(), CPU, channels_last)
    assert isinstance(model, Net)
    return model


def test_weights_and_inputs_of_four_dimensions_lie_in_channels_last_and_no_others_change() -> None:
    plain, last = made(False), made(True)
    assert list(last.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in last.state_dict().items())
    inputs = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(last(inputs, extra="untouched"), plain(inputs))
    assert (plain.seen, last.seen) == ([False], [True])
    assert lies_last(last.convolution.weight)
    assert not lies_last(plain.convolution.weight)


def test_it_lies_as_torch_has_it_and_weights_of_five_dimensions_are_let_be() -> None:
    theirs, ours = (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    for model in (theirs, ours):
        model.register_buffer("grid", torch.zeros(2, 3, 4, 5))
    theirs.to(CPU, memory_format=torch.channels_last)  # type: ignore[call-overload]
    placed(ours, CPU, channels_last=True)
    strides = [[tensor.stride() for tensor in model.state_dict().values()] for model in (theirs, ours)]
    assert strides[0] == strides[1]

    video = placed(nn.ModuleList([nn.Conv3d(3, 6, 3), nn.Conv2d(6, 6, 3)]), CPU, channels_last=True)
    assert lies_last(video.get_parameter("1.weight"))
    assert video.get_parameter("0.weight").is_contiguous()


@pytest.mark.parametrize(
    ("model", "device", "words"),
    [
        (nn.Linear(2, 2), "cpu", "no weight of the model has four dimensions; set it to false"),
        (Net(), "mps", "is for cuda and cpu, and the device is mps"),
        (Net(), "meta", "is for cuda and cpu, and the device is meta"),
    ],
)
def test_where_it_cannot_be_it_is_refused(model: nn.Module, device: str, words: str) -> None:
    with pytest.raises(JobError, match=rf"train\.channels_last .*{words}"):
        placed(model, torch.device(device), channels_last=True)


def test_a_job_trains_evaluates_and_resumes_in_it_bit_for_bit(workplace: Workplace, equal: Any) -> None:
    words = ["train", "digits.yaml", "model=tests.test_placed:Net", "schedule=constant", "train.ema_decay=0.9"]
    for run, steps in (("whole", [20]), ("parted", [10, 20])):
        for stop in steps:
            workplace.run(*words, "train.channels_last=true", f"run.dir=runs/{run}", f"train.max_steps={stop}")
    whole, parted = (workplace.tensors(f"runs/{run}", 20) for run in ("whole", "parted"))
    assert equal(whole, parted)

    workplace.run(*words, "run.dir=runs/plain", "train.max_steps=20")
    last, plain = (workplace.metrics(f"runs/{run}")[-1] for run in ("whole", "plain"))
    assert last["test/loss"] == pytest.approx(plain["test/loss"], rel=1e-3)


def test_a_job_that_asks_for_it_gets_it_and_one_without_convolutions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text(DIGITS)
    settings = ["train.device=cpu", "train.channels_last=true"]
    job = load_job("digits.yaml", [*settings, f"model={__name__}:Net"])
    trainer = session.build(job, ALONE, CPU).trainer
    assert lies_last(trainer.state.model.convolution.weight)
    with pytest.raises(JobError, match=r"train\.channels_last is for convolutions"):
        session.build(load_job("digits.yaml", settings), ALONE, CPU)
