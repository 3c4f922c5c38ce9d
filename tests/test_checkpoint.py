"""Checkpoints: what is saved comes back bit for bit, or is refused in words."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from toolkit import storage
from toolkit.checkpoint import Checkpointer
from toolkit.config.schema import Component
from toolkit.errors import RunError
from toolkit.models.cnn import Cnn
from toolkit.models.gpt import Gpt
from toolkit.models.mlp import Mlp
from toolkit.optim import build_optimizer
from toolkit.trainer import State

OPTIMIZERS = {
    "sgd-momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "sgd": ("sgd", {"lr": 0.1}),
    "adam": ("adam", {"lr": 0.01, "fused": False}),
    "adam-amsgrad-foreach": ("adam", {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "adamw-fused": ("adamw", {"lr": 0.01}),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: Cnn((3, 8, 8), 4, width=4),
    "gpt": lambda: Gpt(11, (6,), layers=1, heads=2, width=8),
}


def new_state(model: Callable[[], nn.Module] = MODELS["cnn"], optimizer: str = "adamw-fused", seed: int = 0) -> State:
    torch.manual_seed(seed)
    built, (name, args) = model(), OPTIMIZERS[optimizer]
    component = Component(name=name, args=args)
    return State(
        built, build_optimizer(built, component, torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)
    )


def trained(state: State, steps: int) -> State:
    """The state after some more steps, each on data that follow from its number."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        if isinstance(state.model, Gpt):
            inputs = torch.randint(11, (5, 6), generator=generator)
        else:
            inputs = torch.randn(5, 3, 8, 8, generator=generator)
        state.model(inputs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
    return state


def tensors_of(state: State) -> dict[str, Tensor]:
    """Every tensor of model and optimizer."""
    found = dict(state.model.state_dict())
    for name, parameter in state.model.named_parameters():
        own = state.optimizer.state.get(parameter, {})
        found |= {f"{name}/{key}": value for key, value in own.items() if isinstance(value, Tensor)}
    return found


def flip_a_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    place = str(tmp_path / "checkpoints") if request.param == "folder" else f"memory://{tmp_path.name}"
    yield place
    storage.remove(place)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_state_comes_back_bit_for_bit_and_trains_on_as_if_undisturbed(
    tmp_path: Path, equal: Any, model: Any, optimizer: str
) -> None:
    saved, loaded = trained(new_state(model, optimizer), 3), new_state(model, optimizer, seed=1)
    saved.best = 0.1 + 0.2
    Checkpointer(str(tmp_path)).save(saved)
    Checkpointer(str(tmp_path)).load(3, loaded)
    assert (loaded.step, loaded.best) == (3, saved.best)
    assert equal(tensors_of(loaded), tensors_of(saved))
    assert equal(tensors_of(trained(loaded, 3)), tensors_of(trained(saved, 3)))


def test_a_state_before_its_first_step_comes_back(url: str, equal: Any) -> None:
    saved, loaded = new_state(), new_state(seed=1)
    Checkpointer(url).save(saved)
    Checkpointer(url).load(0, loaded)
    assert equal(tensors_of(trained(loaded, 2)), tensors_of(trained(saved, 2)))


def test_moments_keep_the_layout_of_their_parameter(tmp_path: Path) -> None:
    saved, loaded = trained(new_state(), 1), new_state(seed=1)
    Checkpointer(str(tmp_path)).save(saved)
    Checkpointer(str(tmp_path)).load(1, loaded)
    kernels = [parameter for parameter in loaded.model.parameters() if parameter.ndim == 4]
    strides = [parameter.stride() for parameter in saved.model.parameters() if parameter.ndim == 4]
    assert [kernel.stride() for kernel in kernels] == strides
    assert [loaded.optimizer.state[kernel]["exp_avg"].stride() for kernel in kernels] == strides


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    saved, loaded = trained(new_state(MODELS["gpt"]), 1), new_state(MODELS["gpt"], seed=1)
    folder = Checkpointer(str(tmp_path)).save(saved)
    with safe_open(f"{folder}/tensors.safetensors", "pt") as file:
        assert [name for name in file.keys() if name in ("model/tokens.weight", "model/logits.weight")] == [  # noqa: SIM118
            "model/tokens.weight"
        ]
    Checkpointer(str(tmp_path)).load(1, loaded)
    assert loaded.model.logits.weight is loaded.model.tokens.weight


def test_the_scale_of_half_precision_comes_back(tmp_path: Path) -> None:
    saved, loaded = new_state(), new_state()
    saved.scaler, loaded.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu")
    Checkpointer(str(tmp_path)).save(saved)
    Checkpointer(str(tmp_path)).load(0, loaded)
    assert loaded.scaler.get_scale() == 1024.0


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [storage.remove, lambda url: storage.write(url, storage.read(url)[:-1])])
def test_a_checkpoint_without_manifest_or_with_a_wrong_size_does_not_exist(url: str, name: str, damage: Any) -> None:
    checkpointer, state = Checkpointer(url), new_state()
    checkpointer.save(trained(state, 1))
    folder = checkpointer.save(trained(state, 1))
    assert (checkpointer.steps(), checkpointer.newest()) == ([1, 2], 2)
    damage(storage.join(folder, name))
    assert (checkpointer.steps(), checkpointer.newest()) == ([1], 1)
    with pytest.raises(RunError, match=r"no whole checkpoint of step 2 .* there are \[1\]"):
        checkpointer.load(2, state)


def test_the_manifest_is_written_last_and_nothing_older_is_touched_before(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, write, remove = list[str](), storage.write, storage.remove
    checkpointer, state = Checkpointer(url, keep=1), trained(new_state(), 1)
    checkpointer.save(state)
    monkeypatch.setattr(storage, "write", lambda at, content: (done.append(f"write {at[-22:]}"), write(at, content)))
    monkeypatch.setattr(storage, "remove", lambda at: (done.append(f"remove {at[len(url) + 1 :]}"), remove(at)))
    checkpointer.save(trained(state, 1))
    older = next(place for place, what in enumerate(done) if what.startswith("remove step-00000001"))
    manifest = next(place for place, what in enumerate(done) if what.startswith("write") and "manifest.json" in what)
    assert manifest == max(place for place, what in enumerate(done) if what.startswith("write"))
    assert manifest < older
    assert done[older] == "remove step-00000001/manifest.json"


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_save_that_fails_leaves_no_new_checkpoint_and_the_old_ones(
    url: str, monkeypatch: pytest.MonkeyPatch, rewritten: bool
) -> None:
    def failing(at: str, content: bytes) -> None:
        if at.endswith("state.json"):
            raise OSError("the disk is full")
        write(at, content)

    write, checkpointer, state = storage.write, Checkpointer(url, keep=1), trained(new_state(), 1)
    checkpointer.save(state)
    checkpointer.save(trained(state, 1)) if rewritten else trained(state, 1)
    monkeypatch.setattr(storage, "write", failing)
    with pytest.raises(OSError, match="the disk is full"):
        checkpointer.save(state)
    assert checkpointer.steps() == ([] if rewritten else [1])  # half new and half old must not pass for whole


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("at", [0, 9, -1])
def test_one_flipped_byte_is_named(tmp_path: Path, equal: Any, name: str, at: int) -> None:
    folder, loaded = Checkpointer(str(tmp_path)).save(trained(new_state(), 1)), new_state(seed=1)
    before = {key: tensor.clone() for key, tensor in tensors_of(loaded).items()}
    flip_a_byte(Path(folder, name), at)
    with pytest.raises(RunError, match=rf"step-00000001/{name} is damaged"):
        Checkpointer(str(tmp_path)).load(1, loaded)
    assert equal(tensors_of(loaded), before)


@pytest.mark.parametrize(
    ("keep", "mode", "scores", "left", "best"),
    [
        (2, "max", [None] * 5, [4, 5], None),
        (1, "max", [None] * 3, [3], None),
        (2, "max", [0.1, 0.9, 0.3, 0.2, 0.4], [2, 4, 5], 2),
        (2, "min", [0.1, 0.9, 0.3, 0.2, 0.4], [1, 4, 5], 1),
        (2, "max", [0.1, 0.2, 0.3, 0.4, 0.5], [4, 5], 5),
        (1, "max", [0.5, None, 0.5, None], [1, 4], 1),
        (9, "max", [0.1, 0.2], [1, 2], 2),
    ],
)
def test_the_newest_and_the_best_stay(
    url: str, keep: int, mode: str, scores: list[float | None], left: list[int], best: int | None
) -> None:
    checkpointer, state = Checkpointer(url, keep, mode), new_state()
    for score in scores:
        state.step += 1
        checkpointer.save(state, score)
    assert (checkpointer.steps(), checkpointer.best()) == (left, best)
    assert storage.names(url) == [f"step-{step:08d}" for step in left]


def test_a_checkpoint_of_another_model_is_refused_with_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    Checkpointer(str(tmp_path)).save(new_state(lambda: Mlp((3, 8, 8), 4, hidden=(5, 6))))
    with pytest.raises(RunError, match="the checkpoint does not fit the model") as refusal:
        Checkpointer(str(tmp_path)).load(0, new_state(lambda: Mlp((3, 8, 8), 4, hidden=(7,), dropout=0.5)))
    missing, _, rest = str(refusal.value).partition("left over")
    left_over, _, shapes = rest.partition("other shapes")
    assert "'layers.4.weight', 'layers.4.bias'" in missing or "'layers.4.bias', 'layers.4.weight'" in missing
    assert all(name in left_over for name in ("'layers.3.bias'", "'layers.3.weight'", "'layers.5.bias'"))
    assert "layers.1.weight: saved (5, 192), model has (7, 192)" in shapes
    assert "layers.1.bias: saved (5,), model has (7,)" in shapes


def test_optimizer_state_that_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    state = trained(new_state(), 1)
    state.optimizer.state[next(state.model.parameters())]["history"] = [1, 2]
    with pytest.raises(RunError, match=r"optimizer state 'history' of layers.0.weight is a list"):
        Checkpointer(str(tmp_path)).save(state)
    assert Checkpointer(str(tmp_path)).steps() == []


def test_nothing_is_pickled_and_every_byte_is_json_or_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    for module, name in [(pickle, "dumps"), (pickle, "loads"), (pickle, "dump"), (pickle, "load"), (torch, "save"),
                         (torch, "load"), (pickle, "Pickler"), (pickle, "Unpickler")]:  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    state = trained(new_state(), 1)
    folder = Path(Checkpointer(str(tmp_path)).save(state))
    Checkpointer(str(tmp_path)).load(1, state)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert json.loads((folder / "state.json").read_text())["step"] == 1
    assert json.loads((folder / "manifest.json").read_text())["step"] == 1
    content = (folder / "tensors.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + header])
    kinds = {entry["dtype"] for name, entry in entries.items() if name != "__metadata__"}
    assert kinds == {"F32", "I64"}
    end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    assert 8 + header + end == len(content)
