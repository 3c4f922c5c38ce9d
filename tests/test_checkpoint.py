"""Saving beside the loop, and resuming: what is saved comes back bit for bit, or is refused in words."""

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import small_disk_of
from tests.states import (
    MODELS,
    OPTIMIZERS,
    Killed,
    Store,
    all_of,
    bits,
    files_of,
    new_state,
    save,
    save_together,
    shared,
    silent,
    small_state,
    tensors_of,
    trained,
    wide_state,
    world,
)
from toolkit import storage
from toolkit.checkpoint import Archive, Checkpointer, Policy, export, manifest, plan, retention, writer
from toolkit.checkpoint.manifest import DTYPES, DamagedError
from toolkit.checkpoint.state import to_plain
from toolkit.errors import RunError
from toolkit.models.mlp import Mlp
from toolkit.optim import Ema, freeze
from toolkit.trainer import State

WAIT_S = 30


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    place = str(tmp_path / "checkpoints") if request.param == "folder" else f"memory://{tmp_path.name}"
    yield place
    storage.remove(place)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


def resumed(url: str, state: State) -> State:
    """The state after it has resumed, which must have found something."""
    assert Checkpointer(Archive(url)).resume(state, silent) == state.step
    return state


def model_of(tensors: dict[str, Tensor]) -> State:
    """A state whose model has these for parameters, of which none is trained but one of its own."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return State(model, torch.optim.SGD([model.weight], lr=0.1), torch.amp.GradScaler("cpu", enabled=False))


# -- what comes back


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_state_comes_back_bit_for_bit_and_trains_on_as_if_undisturbed(
    folder: str, model: Any, optimizer: str, ema: bool
) -> None:
    saved, loaded = trained(new_state(model, optimizer, ema=ema), 3), new_state(model, optimizer, seed=1, ema=ema)
    saved.best = 0.1 + 0.2
    save(folder, saved)
    assert all_of(resumed(folder, trained(loaded, 2))) == all_of(saved)
    assert (loaded.step, loaded.best) == (3, saved.best)
    assert all_of(trained(loaded, 3)) == all_of(trained(saved, 3))


def test_a_state_before_its_first_step_comes_back(url: str) -> None:
    saved, loaded = new_state(), new_state(seed=1)
    save(url, saved)
    assert all_of(trained(resumed(url, loaded), 2)) == all_of(trained(saved, 2))


def test_there_is_nothing_to_resume_at_first(url: str) -> None:
    state = small_state()
    before = all_of(state)
    assert Checkpointer(Archive(url)).resume(state) is None
    assert all_of(state) == before
    assert storage.names(url) == []


def test_moments_keep_the_layout_of_their_parameter(folder: str) -> None:
    saved, loaded = trained(new_state(), 1), new_state(seed=1)
    save(folder, saved)
    resumed(folder, loaded)
    kernels = [parameter for parameter in loaded.model.parameters() if parameter.ndim == 4]
    strides = [parameter.stride() for parameter in saved.model.parameters() if parameter.ndim == 4]
    assert any(not kernel.is_contiguous() for kernel in kernels), "the model is channels_last"
    assert [kernel.stride() for kernel in kernels] == strides
    assert [loaded.optimizer.state[kernel]["exp_avg"].stride() for kernel in kernels] == strides


def test_moments_that_are_there_are_filled_where_they_are(folder: str) -> None:
    """A run that goes back has no memory for them twice."""
    saved = trained(new_state(), 1)
    save(folder, saved)
    loaded = trained(new_state(), 2)
    before = {id(value) for kept in loaded.optimizer.state.values() for value in kept.values()}
    resumed(folder, loaded)
    assert {id(value) for kept in loaded.optimizer.state.values() for value in kept.values()} == before
    assert all_of(loaded) == all_of(saved)


def test_tied_weights_are_stored_once_and_stay_tied(folder: str) -> None:
    saved, loaded = trained(new_state(MODELS["gpt"]), 1), new_state(MODELS["gpt"], seed=1)
    save(folder, saved)
    found = Archive(folder).whole(1)
    assert "model/tokens.weight" in found.tensors
    assert "model/logits.weight" not in found.tensors
    assert Archive(folder).values(found).tied == {"logits.weight": "tokens.weight"}
    resumed(folder, loaded)
    assert loaded.model.logits.weight is loaded.model.tokens.weight


def test_a_tied_weight_is_left_out_by_any_of_its_names(folder: str) -> None:
    save(folder, new_state(MODELS["gpt"]))
    whole = export.fit(f"{folder}/step-00000000", new_state(MODELS["gpt"]).model)
    (first,) = set(Archive(folder).values(whole.manifest).tied.values())
    for name in ("logits.*", first):
        fit = export.fit(f"{folder}/step-00000000", new_state(MODELS["gpt"]).model, [name])
        assert (fit.anew, fit.unused) == ([first], [first])
        assert fit.sources.keys() == whole.sources.keys() - {first}


def test_the_scale_of_half_precision_comes_back(folder: str) -> None:
    saved, loaded = new_state(), new_state()
    saved.scaler, loaded.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu")
    saved.scaler.load_state_dict(saved.scaler.state_dict() | {"_growth_tracker": 17, "growth_factor": 2.1})
    save(folder, saved)
    resumed(folder, loaded)
    assert loaded.scaler.get_scale() == 1024.0
    assert loaded.scaler.state_dict() == saved.scaler.state_dict()


@pytest.mark.parametrize("limits", [(8 << 20, 32 << 20), (64, 200)], ids=["usual", "small"])
def test_every_type_shape_and_layout_comes_back_with_every_bit(
    folder: str, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]
) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", limits[0])
    monkeypatch.setattr(plan, "FILE_BYTES", limits[1])
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, dtype in DTYPES.items():
        content = torch.randint(0, 256, (60 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        flat = (content % 2 if dtype == torch.bool else content).view(dtype)
        tensors |= {
            f"{name}_scalar": flat[7].clone(),
            f"{name}_empty": flat[:0].reshape(3, 0, 2),
            f"{name}_dense": flat.reshape(3, 4, 5).clone(),
            f"{name}_transposed": flat.reshape(3, 4, 5).permute(2, 0, 1),
            f"{name}_every_other": flat[::2],
            f"{name}_expanded": flat[:4].unsqueeze(1).expand(4, 3),
            f"{name}_channels_last": flat.reshape(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        }
    nan = torch.tensor([0x7FC12345, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert all(isnan(value) for value in nan.tolist())
    numbers = torch.randn(4, dtype=torch.complex64, generator=generator)
    tensors |= {"nan": nan, "conjugate": numbers.conj(), "negative": torch._neg_view(torch.randn(4))}
    save(folder, model_of(tensors))
    places = {name: torch.empty_like(tensor).zero_().contiguous() for name, tensor in tensors.items()}
    places |= {"conjugate": torch.zeros(4, dtype=torch.complex64).conj(), "negative": torch._neg_view(torch.zeros(4))}
    loaded = model_of(places)
    resumed(folder, loaded)
    assert bits({name: loaded.model.get_parameter(name) for name in tensors}) == bits(tensors)
    found = Archive(folder).verify(0)
    sizes = [entry.bytes for name, entry in found.files.items() if name != found.state]
    assert max(sizes) <= limits[1]
    assert len(sizes) == 1 or limits[1] == 200


def test_a_large_tensor_is_cut_in_chunks_and_comes_back(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(plan, "FILE_BYTES", 10_000)
    tensors = {"large": torch.randn(7, 11, 300), "long": torch.randn(30_000)}
    save(folder, model_of(tensors))
    found = Archive(folder).whole(0)
    assert {name: len(found.tensors[f"model/{name}"].chunks) for name in tensors} == {"large": 28, "long": 30}
    assert len(found.files) > 20
    loaded = model_of({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert bits(tensors_of(resumed(folder, loaded))) == bits(tensors_of(model_of(tensors)))


def test_plain_values_of_an_optimizer_come_back_as_they_were(folder: str) -> None:
    values = {
        "int": 2**70, "negative": -1, "zero": 0, "yes": True, "none": None, "text": 'ä "\n\x00', "third": 1 / 3,
        "smallest": 5e-324, "largest": 1.7976931348623157e308, "sum": 0.1 + 0.2, "minus zero": -0.0, "whole": 3.0,
    }  # fmt: skip
    saved, loaded = small_state(1), small_state(2)
    saved.optimizer.state[saved.model[1].bias] |= values
    save(folder, saved)
    resumed(folder, loaded)
    found = {name: loaded.optimizer.state[loaded.model[1].bias][name] for name in values}
    assert [(type(value), repr(value)) for value in found.values()] == [
        (type(value), repr(value)) for value in values.values()
    ]


def test_best_is_a_float_or_nothing(folder: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for best in [None, -0.0, *(torch.rand(20, generator=generator, dtype=torch.float64) ** 40 - 0.5).tolist()]:
        saved = small_state()
        saved.best = best
        save(folder, saved)
        assert repr(resumed(folder, small_state(1)).best) == repr(best)


def test_a_manifest_says_what_wrote_it(folder: str) -> None:
    ranks = world(Archive(folder, config_digest="digest"), 2, attempt=7, global_batch_size=32)
    save_together(ranks, [small_state(step=5), small_state(step=5)], score=0.25)
    found = Archive(folder).whole(5)
    about = (found.step, found.samples, found.world_size, found.attempt, found.score, found.config_digest)
    assert about == (5, 160, 2, 7, 0.25, "digest")
    assert found.versions["torch"] == torch.__version__
    assert found.saved_at.startswith("20")


def test_nothing_is_pickled_and_every_byte_is_json_or_numbers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    for module, name in [(pickle, "dumps"), (pickle, "loads"), (pickle, "dump"), (pickle, "load"), (torch, "save"),
                         (torch, "load"), (pickle, "Pickler"), (pickle, "Unpickler")]:  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    state = trained(new_state(ema=True), 1)
    save(folder, state)
    resumed(folder, state)
    names = ["data-1.1.0.0.bin", "manifest.json", "state-1.1.json"]
    assert storage.names(Archive(folder).folder(1)) == names
    assert json.loads(storage.read(f"{folder}/step-00000001/manifest.json"))["manifest"]["step"] == 1
    assert json.loads(storage.read(f"{folder}/step-00000001/state-1.1.json"))["step"] == 1
    numbers = sum(tensor.nbytes for tensor in to_plain(state)[0].values())
    assert storage.size(f"{folder}/step-00000001/data-1.1.0.0.bin") == numbers


# -- what does not fit


def test_a_checkpoint_of_another_model_is_refused_with_every_tensor_that_does_not_fit(folder: str) -> None:
    save(folder, new_state(lambda: Mlp((3, 8, 8), 4, hidden=(5, 6))))
    with pytest.raises(RunError, match="the checkpoint does not fit the job") as refusal:
        resumed(folder, new_state(lambda: Mlp((3, 8, 8), 4, hidden=(7,), dropout=0.5)))
    missing, _, rest = str(refusal.value).partition("left over in it")
    left_over, _, rest = rest.partition("\n")
    assert all(f"'model/layers.4.{name}'" in missing for name in ("weight", "bias"))
    assert all(f"'model/layers.{name}'" in left_over for name in ("3.bias", "3.weight", "5.bias", "5.weight"))
    assert "model/layers.1.weight: (5, 192) float32 in the checkpoint, (7, 192) float32 in the job" in rest
    assert "model/layers.1.bias: (5,) float32 in the checkpoint, (7,) float32 in the job" in rest
    assert "--fresh" in rest


def other_type(state: State) -> None:
    state.model.double()


def frozen(state: State) -> None:
    freeze(state.model, ["1.*"])
    state.optimizer = torch.optim.Adam([parameter for parameter in state.model.parameters() if parameter.requires_grad])
    state.ema = Ema(state.model, 0.9)


def without_ema(state: State) -> None:
    state.ema = None


def scaled(state: State) -> None:
    state.scaler = torch.amp.GradScaler("cpu")


@pytest.mark.parametrize(
    ("change", "there", "here"),
    [
        (other_type, "model/1.bias: (1,) float32 in the checkpoint, (1,) float64 in the job",
                     "model/1.bias: (1,) float64 in the checkpoint, (1,) float32 in the job"),
        (without_ema, "left over in it: ['ema/0.bias', 'ema/0.weight', 'ema/1.bias', 'ema/1.weight']",
                      "missing in the checkpoint: ['ema/0.bias', 'ema/0.weight', 'ema/1.bias', 'ema/1.weight']"),
        (frozen, "trained then but not now: ['1.bias', '1.weight']\n  trained now but not then: none",
                 "trained then but not now: none\n  trained now but not then: ['1.bias', '1.weight']"),
        (scaled, "loss scaling then [], now ['_growth_tracker',", "'growth_interval', 'scale'], now []"),
    ],
)  # fmt: skip
def test_what_is_missing_or_left_over_is_listed_on_both_sides(
    folder: str, change: Callable[[State], None], there: str, here: str
) -> None:
    plain, changed = small_state(1), small_state(2, step=1)
    change(changed)
    save(folder, plain)
    with pytest.raises(RunError, match="the checkpoint does not fit the job") as refusal:
        resumed(folder, changed)
    assert there in str(refusal.value)
    save(folder, changed)
    with pytest.raises(RunError, match="the checkpoint does not fit the job") as refusal:
        resumed(folder, plain)
    assert here in str(refusal.value)


def test_a_checkpoint_of_another_job_is_refused(folder: str) -> None:
    saver = Checkpointer(Archive(folder, config_digest="one"))
    saver.save(small_state())
    saver.wait()
    with pytest.raises(RunError, match=r"step-00000000 was written by another job; .*--fresh"):
        Checkpointer(Archive(folder, config_digest="other")).resume(small_state())


def test_a_checkpoint_of_another_version_is_refused_and_left_as_it_is(folder: str) -> None:
    save(folder, small_state(1, step=1))
    first = {"format": 1, "step": 2, "score": None, "files": {}}
    storage.write(f"{folder}/step-00000002/manifest.json", json.dumps(first, indent=1).encode())
    before = files_of(folder)
    with pytest.raises(RunError, match=r"format 1, this version of toolkit reads 2; .*--fresh"):
        Checkpointer(Archive(folder)).resume(small_state())
    future = storage.read(f"{folder}/step-00000001/manifest.json").partition(b"\n")[2]
    future = future.replace(b'"format":2', b'"format":31').replace(b'"step":1', b'"step":3')
    head = f'{{"xxh3_128":"{manifest.checksum(future)}",\n'.encode()
    storage.write(f"{folder}/step-00000002/manifest.json", head + future)
    with pytest.raises(RunError, match=r"format 31, this version of toolkit reads 2"):
        Checkpointer(Archive(folder)).resume(small_state())
    assert files_of(folder) == before


class Extra(nn.Linear):
    """A module with state that is neither a parameter nor a buffer."""

    def get_extra_state(self) -> Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: Any) -> None:
        del state


def with_history(state: State, value: Any) -> State:
    state.optimizer.state[state.model[0].weight]["history"] = value
    return state


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: with_history(small_state(), [1, 2]), r"optimizer state 'history' of 0.weight is a list"),
        (lambda: with_history(small_state(), float("inf")), r"optimizer state 'history' of 0.weight is inf"),
        (lambda: model_of({"x": torch.eye(2).to_sparse()}), r"model/x is a tensor of torch.sparse_coo, torch.float32"),
        (lambda: model_of({"x": torch.zeros(2, dtype=torch.complex32)}), "model/x is a tensor of .*complex32"),
        (
            lambda: State(Extra(1, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))]), torch.amp.GradScaler("cpu")),
            r"_extra_state in the model's state_dict is neither a parameter nor a buffer",
        ),
    ],
    ids=["list", "infinite", "sparse", "complex32", "extra"],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning", "ignore:.*beta state:UserWarning")
def test_what_cannot_be_given_back_is_refused_before_anything_is_written(folder: str, make: Any, words: str) -> None:
    with pytest.raises(RunError, match=words):
        Checkpointer(Archive(folder)).save(make())
    assert not Path(folder).exists()


# -- several ranks


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_what_all_ranks_hold_is_written_by_all_a_share_each(folder: str, world_size: int) -> None:
    states = [wide_state() for _ in range(world_size)]
    save_together(world(Archive(folder), world_size), states)
    found = Archive(folder).verify(1)
    shares = dict.fromkeys(range(world_size), 0)
    for name, entry in found.files.items():
        if name != found.state:
            shares[int(name.split(".")[2])] += entry.bytes
    total = sum(tensor.nbytes for tensor in tensors_of(states[0]).values())
    assert sum(shares.values()) == total
    assert max(shares.values()) < 1.35 * total / world_size
    assert files_of(folder) == {f"step-00000001/{name}" for name in (*found.files, manifest.NAME)}
    assert all_of(resumed(folder, wide_state(seed=1))) == all_of(states[0])


def test_of_buffers_that_differ_those_of_rank_0_are_saved(folder: str) -> None:
    """Running statistics are those of a rank's own batches until the next forward; DDP then takes rank 0's."""
    states = [wide_state() for _ in range(3)]
    for rank, state in enumerate(states):
        for buffer in state.model.buffers():
            buffer.fill_(rank)
    save_together(world(Archive(folder), 3), states)
    loaded = resumed(folder, wide_state(seed=1))
    assert all_of(loaded) == all_of(states[0])


def test_a_small_state_is_written_by_rank_0_alone(folder: str) -> None:
    ranks = world(Archive(folder), 4)
    save_together(ranks, [small_state() for _ in ranks])
    assert storage.names(f"{folder}/step-00000000") == ["data-1.1.0.0.bin", "manifest.json", "state-1.1.json"]
    assert [rank.saved_step for rank in ranks] == [0, None, None, None]


def test_a_rank_that_cannot_write_its_share_makes_the_save_fail_with_its_words(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(at: str, content: Any, **how: Any) -> None:
        if "data-1.2.1." in at:
            raise OSError("no disk on this machine")
        write(at, content, **how)

    archive, write = Archive(folder), storage.write
    ranks = world(archive, 3)
    save_together(ranks, [wide_state(step=1) for _ in ranks])
    monkeypatch.setattr(storage, "write", failing)
    save_together(ranks, [wide_state(seed=1, step=2) for _ in ranks])
    expected = "the checkpoint of step 2 could not be saved: rank 1 could not save its share: no disk on this machine"
    assert ranks[0].failure == expected
    assert ranks[1].failure == "the checkpoint of step 2 could not be saved: no disk on this machine"
    assert [rank.failures for rank in ranks] == [1, 1, 0]
    assert archive.steps() == [1]
    save_together(ranks, [wide_state(seed=2, step=3) for _ in ranks])
    assert [rank.failure for rank in ranks] == [None] * 3
    assert archive.steps() == [1, 3]
    assert all_of(resumed(folder, wide_state(seed=9))) == all_of(wide_state(seed=2, step=3))
    assert archive.folders() == [1, 3], "nothing is left of step 2"


def test_a_rank_that_never_delivers_is_waited_for_only_so_long(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_TIMEOUT_S", 0.2)
    archive = Archive(folder)
    save(folder, wide_state(step=1))
    rank = world(archive, 3)[0]
    rank.save(wide_state(step=2))
    rank.wait()
    assert rank.failure == (
        "the checkpoint of step 2 could not be saved: ranks [1, 2] have written nothing for 0 s; "
        f"is {archive.folder(2)} the same place for all ranks?"
    )
    assert archive.steps() == [1]
    assert not storage.sizes(archive.folder(2))


def test_a_part_that_is_not_one_makes_the_save_fail(folder: str) -> None:
    rank = world(Archive(folder), 2)[0]
    storage.write(f"{folder}/step-00000001/part-1.1.1.json", b'{"files": 3}')
    rank.save(wide_state())
    rank.wait()
    assert "step-00000001/part-1.1.1.json is not what rank 1 wrote" in str(rank.failure)
    assert Archive(folder).steps() == []


# -- beside the loop


class Gate:
    """storage.write and storage.create, held until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: str = "") -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        for name in ("write", "create"):
            monkeypatch.setattr(storage, name, self._held(getattr(storage, name), held))

    def _held(self, operation: Callable[..., Any], held: str) -> Callable[..., Any]:
        def waiting(url: str, *arguments: Any, **options: Any) -> Any:
            if held in url:
                self.reached.set()
                assert self.open.wait(WAIT_S), "nobody opened the gate"
            return operation(url, *arguments, **options)

        return waiting


def test_a_save_returns_before_it_is_written_and_holds_the_state_as_it_was(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained(new_state(ema=True), 2)
    before, gate, saver = all_of(state), Gate(monkeypatch), Checkpointer(Archive(url))
    saver.save(state)
    assert gate.reached.wait(WAIT_S)
    assert saver.saving
    assert Archive(url).steps() == []
    trained(state, 2)
    for tensor in tensors_of(state).values():
        tensor.zero_()
    state.best = 0.5
    gate.open.set()
    saver.wait()
    assert (saver.saving, saver.saved_step, saver.failure) == (False, 2, None)
    assert all_of(resumed(url, new_state(seed=1, ema=True))) == before


def test_one_save_is_in_flight_and_the_next_waits_for_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, archive = Gate(monkeypatch, "step-00000001/manifest.json"), None, Archive(folder)
    saver = Checkpointer(archive)
    saver.save(small_state(1, step=1))
    assert gate.reached.wait(WAIT_S)
    second = threading.Thread(target=saver.save, args=(small_state(2, step=2),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second save must wait for the first"
    assert archive.folders() == [1]
    gate.open.set()
    second.join(WAIT_S)
    saver.wait()
    assert archive.steps() == [1, 2]
    for step in (1, 2):
        loaded = small_state(9)
        archive.load(step, loaded)
        assert all_of(loaded) == all_of(small_state(step, step=step))


def test_room_made_beforehand_is_used_and_saves_nothing_by_itself(folder: str) -> None:
    saver, state = Checkpointer(Archive(folder)), small_state(step=1)
    saver.prepare(state)
    saver.wait()
    room = saver._snapshots.buffer.data_ptr()
    assert not Path(folder).exists()
    for seed in range(3):
        saver.save(small_state(seed, step=seed))
    saver.wait()
    assert saver._snapshots.buffer.data_ptr() == room
    assert all_of(resumed(folder, small_state(9))) == all_of(small_state(2, step=2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_whatever_operation_fails_is_told_and_older_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """The store is away for one operation of a save, each in turn."""
    shared(monkeypatch)
    monkeypatch.setattr(writer, "PART_TIMEOUT_S", 0.1)
    first, second, third = (small_state(seed, step=seed) for seed in (1, 2, 3))
    failures = 0
    for number in range(200):
        url = str(tmp_path / f"{number}")
        ranks = world(Archive(url, Policy(keep=1)), world_size)
        save_together(ranks, [first] * world_size)
        store = Store()
        store.fails_at = number
        with store.between():
            save_together(ranks, [second] * world_size)
        if len(store.done) <= number:
            break
        name, where = store.done[number]
        loaded = Archive(url).newest()
        if ranks[0].failure:
            failures += 1
            assert ranks[0].failures == 1
            assert loaded == 1, f"{name} {where}"
            if world_size == 1 and name != "create":  # whether that has failed is known to the store alone
                assert files_of(f"{url}/step-00000002") == set(), f"{name} {where}"
        else:
            assert loaded == 2, f"{name} {where}"
        save_together(ranks, [third] * world_size)
        assert ranks[0].failure is None
        assert Archive(url).folders() == [3], f"after {name} {where} failed"
        assert all_of(resumed(url, small_state(9))) == all_of(third)
    else:
        pytest.fail("there is no end to a save")
    assert failures >= 5


def test_what_must_not_be_older_than_a_checkpoint_is_done_just_before_its_manifest(folder: str) -> None:
    store, saver, seen = Store(), Checkpointer(Archive(folder)), []
    with store.between():
        saver.save(small_state(step=1), None, lambda: seen.extend(store.done))
        saver.wait()
    written = [where for name, where in store.done if name in ("write", "create")]
    assert [where for name, where in seen if name in ("write", "create")] == written[:-1]
    assert written[-1] == f"{folder}/step-00000001/manifest.json"

    def away() -> None:
        raise OSError("the metrics cannot be uploaded")

    saver.save(small_state(step=2), None, away)
    saver.wait()
    assert saver.failure == "the checkpoint of step 2 could not be saved: the metrics cannot be uploaded"
    assert Archive(folder).steps() == [1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    with small_disk_of("2m", tmp_path) as place:
        yield str(place)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_a_full_disk_fails_the_save_and_older_checkpoints_stay(
    small_disk: str, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Seen beforehand; and when it is not, because somebody else has filled it meanwhile, in the middle of a write."""
    monkeypatch.setattr(plan, "FILE_BYTES", 256 << 10)
    if not checked:
        monkeypatch.setattr(writer, "check_space", lambda url, needed: None)
    saver = Checkpointer(Archive(f"{small_disk}/checkpoints"))
    saver.save(small_state(1, step=1))
    saver.save(model_of({"large": torch.randn(1 << 20)}))
    saver.wait()
    assert saver.failure is not None
    assert "No space left on device" in saver.failure
    assert ("a checkpoint needs 5.0 MiB" in saver.failure) == checked
    assert saver.archive.steps() == [1]
    assert files_of(f"{small_disk}/checkpoints/step-00000000") == set()
    saver.save(small_state(3, step=3))
    saver.wait()
    assert saver.failure is None
    assert all_of(resumed(f"{small_disk}/checkpoints", small_state(9))) == all_of(small_state(3, step=3))


# -- killed


def test_every_file_is_on_disk_before_the_manifest_names_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, create = set[str](), storage.create

    def creating(url: str, content: bytes) -> bool:
        if url.endswith("/manifest.json"):
            files = Path(url).parent.glob("data-*")
            assert {str(file) for file in files} <= synced
            synced.add(url)
        return create(url, content)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(storage, "create", creating)
    save(folder, small_state())
    assert any(name.endswith("/manifest.json") for name in synced)


def test_the_manifest_is_written_last_and_nothing_older_is_touched_before(url: str) -> None:
    saver = Checkpointer(Archive(url, Policy(keep=1)))
    saver.save(small_state(1, step=1))
    saver.wait()
    store = Store()
    with store.between():
        saver.save(small_state(2, step=2))
        saver.wait()
    done = [(name, where.removeprefix(url + "/")) for name, where in store.done]
    written = [place for place, (name, _) in enumerate(done) if name in ("write", "create")]
    removed = [place for place, (name, _) in enumerate(done) if name in ("remove", "move")]
    assert done[written[-1]] == ("create", "step-00000002/manifest.json")
    assert written[-1] < removed[0]
    assert [done[place][1] for place in removed] == ["step-00000001/manifest.json", "step-00000001"]


SITUATIONS = {
    "the first": (1, [], 2),
    "one more": (1, [1], 2),
    "the same step again": (1, [1, 2], 2),
    "of two ranks": (2, [1], 2),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("acts", [False, True], ids=["before", "after"])
def test_killed_at_any_operation_a_save_leaves_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, situation: str, acts: bool
) -> None:
    """Dies before or after each storage operation in turn, in the middle of a write as well; the next start cleans."""
    shared(monkeypatch)
    monkeypatch.setattr(writer, "PART_TIMEOUT_S", 0.1)
    world_size, earlier, step = SITUATIONS[situation]
    outcomes = set()
    for number in range(200):
        url = str(tmp_path / f"{number}")
        archive = Archive(url, Policy(keep=1))
        for before in earlier:
            save_together(world(archive, world_size, attempt=1), [small_state(before, step=before)] * world_size)
        store = Store()
        store.dies_at, store.acts = number, acts
        with store.between():
            ranks = world(archive, world_size, attempt=2)
            for rank in reversed(ranks):
                rank.save(small_state(7, step=step))
            for rank in ranks:
                try:
                    rank.wait()
                except Killed:
                    continue
        if len(store.done) <= number:
            break
        loaded = small_state(9, step=99)
        found = Checkpointer(Archive(url)).resume(loaded, silent)
        where = f"killed at {store.done[number]}"
        assert found in {step, max(earlier, default=None)}, where
        if found is not None:
            old = all_of(small_state(found, step=found)) if found in earlier else None
            assert all_of(loaded) in (old, all_of(small_state(7, step=step))), where
            outcomes.add(all_of(loaded) == old)
            whole = Archive(url).verify(found)
            left = {f"step-{found:08d}/{name}" for name in (*whole.files, manifest.NAME)}
            assert {path for path in files_of(url) if path.startswith(f"step-{found:08d}/")} == left, where
        assert Archive(url).folders() == Archive(url).steps(), where
        assert not Archive(url).aside(), where
        assert not [path for path in files_of(url) if ".tmp-" in path or "part-" in path], where
        third = small_state(3, step=3)
        save_together(world(Archive(url, Policy(keep=1)), world_size, attempt=3), [third] * world_size)
        assert Archive(url).folders() == [3], where
    else:
        pytest.fail("there is no end to a save")
    assert number > 8
    assert outcomes == ({True, False} if earlier else {False})


@pytest.mark.parametrize("acts", [False, True], ids=["before", "after"])
def test_killed_at_any_operation_a_resume_can_be_tried_again(tmp_path: Path, acts: bool) -> None:
    """With leftovers to clean and a damaged checkpoint to put aside."""
    for number in range(200):
        url = str(tmp_path / f"{number}")
        for step in (1, 2, 3):
            save(url, small_state(step, step=step))
        Path(url, "step-00000003/data-3.1.0.0.bin").write_bytes(b"damaged")
        storage.remove(f"{url}/step-00000002/manifest.json")
        Path(url, "step-00000001/part-9.9.1.json").write_bytes(b"left")
        store = Store()
        store.dies_at, store.acts = number, acts
        with store.between():
            try:
                Checkpointer(Archive(url)).resume(small_state(), silent)
            except Killed:
                pass
            else:
                break
        assert all_of(resumed(url, small_state(9))) == all_of(small_state(1, step=1)), store.done[number]
        assert Archive(url).aside() == ["step-00000003"]
        assert Archive(url).folders() == [1]
    else:
        pytest.fail("there is no end to a resume")
    assert number > 5


# -- one writer at a time


def test_the_manifest_of_a_higher_attempt_is_never_replaced(url: str) -> None:
    archive = Archive(url)
    save(url, small_state(5, step=1), attempt=5)
    late = Checkpointer(archive, attempt=4)
    late.save(small_state(4, step=1))
    with pytest.raises(RunError, match=r"step-00000001/manifest.json is already that of attempt 5; this is 4"):
        late.wait()
    assert archive.whole(1).attempt == 5
    assert all_of(resumed(url, small_state(9))) == all_of(small_state(5, step=1))
    assert storage.names(archive.folder(1)) == ["data-5.1.0.0.bin", "manifest.json", "state-5.1.json"]


def test_a_step_is_saved_again_by_a_later_attempt_and_by_the_same(url: str) -> None:
    archive, last = Archive(url), Checkpointer(Archive(url), attempt=6)
    save(url, small_state(1, step=1), attempt=5)
    for seed, save_number in ((2, 1), (3, 2)):
        last.save(small_state(seed, step=1))
        last.wait()
        assert last.failure is None
        assert all_of(resumed(url, small_state(9))) == all_of(small_state(seed, step=1))
        expected = [f"data-6.{save_number}.0.0.bin", "manifest.json", f"state-6.{save_number}.json"]
        assert storage.names(archive.folder(1)) == expected


def test_a_damaged_manifest_is_replaced_whoever_wrote_it(folder: str) -> None:
    save(folder, small_state(1, step=1), attempt=5)
    Path(folder, "step-00000001/manifest.json").write_bytes(b"")
    save(folder, small_state(2, step=1), attempt=4)
    assert all_of(resumed(folder, small_state(9))) == all_of(small_state(2, step=1))


def test_whoever_has_lost_the_lock_commits_nothing(url: str) -> None:
    def lost() -> None:
        raise RunError("attempt 9 on host x has taken over")

    save(url, small_state(1, step=1), attempt=1)
    saver, store = Checkpointer(Archive(url), attempt=2, check_lock=lost), Store()
    with store.between():
        saver.save(small_state(2, step=2))
        with pytest.raises(RunError, match="attempt 9 on host x has taken over"):
            saver.wait()
    assert "create" not in {name for name, _ in store.done}
    assert Archive(url).steps() == [1]
    assert saver.saved_step is None


def test_without_a_number_an_attempt_is_one_more_than_any_before(folder: str) -> None:
    for number in (1, 2, 3):
        save(folder, small_state(step=7))
        assert Archive(folder).whole(7).attempt == number


# -- damaged


def damaged(url: str, step: int, at: int = 0) -> str:
    """Flip a bit of a checkpoint's data; returns the file."""
    (name,) = [name for name in storage.names(f"{url}/step-{step:08d}") if name.startswith("data-")]
    where = f"{url}/step-{step:08d}/{name}"
    content = bytearray(storage.read(where))
    content[at] ^= 1
    storage.write(where, bytes(content))
    return where


def test_a_damaged_newest_is_named_and_put_aside_and_the_one_before_is_taken(url: str) -> None:
    saver, said = Checkpointer(Archive(url)), list[str]()
    for step in (1, 2, 3):
        saver.save(small_state(step, step=step))
    saver.wait()
    names = [damaged(url, step, at=-1) for step in (3, 2)]
    loaded = small_state(9)
    assert saver.resume(loaded, said.append) == 1
    assert all_of(loaded) == all_of(small_state(1, step=1))
    for words, name, step in zip(said, names, (3, 2), strict=True):
        assert words.startswith(f"{name} is damaged: XXH3-128 of bytes ")
        aside = f"{url}/damaged/step-{step:08d}"
        assert words.endswith(f"the checkpoint of step {step} is put aside as {aside}; taking the one before")
        assert storage.names(aside)
    assert storage.names(url) == ["damaged", "step-00000001"]


def test_no_whole_checkpoint_left_is_an_error_and_again_at_the_next_start(url: str) -> None:
    for step in (1, 2):
        save(url, small_state(step, step=step))
    name = damaged(url, 1)
    storage.write(f"{url}/step-00000002/manifest.json", b"")
    for words in (name + " is damaged", ""):
        with pytest.raises(RunError, match="no checkpoint is left that is whole") as refusal:
            Checkpointer(Archive(url)).resume(small_state(), silent)
        assert words in str(refusal.value)
        assert f"{url}/damaged holds step-00000001, step-00000002." in str(refusal.value)
        assert "--fresh" in str(refusal.value)


def test_several_damaged_ones_of_a_step_all_have_a_place_aside(folder: str) -> None:
    save(folder, small_state(1, step=1))
    for _ in range(3):
        save(folder, small_state(2, step=2))
        damaged(folder, 2)
        resumed(folder, small_state())
    assert Archive(folder).aside() == ["step-00000002", "step-00000002-2", "step-00000002-3"]


def test_a_store_that_is_away_is_no_damage(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise PermissionError("no access")

    save(folder, small_state(1, step=1))
    before = files_of(folder)
    monkeypatch.setattr(storage, "read_into", away)
    with pytest.raises(PermissionError, match="no access"):
        Checkpointer(Archive(folder)).resume(small_state())
    assert files_of(folder) == before


def test_only_leftovers_are_cleaned(folder: str) -> None:
    """What is whole, what is damaged and what is not ours stays."""
    for step in (1, 2, 3):
        save(folder, small_state(step, step=step))
    storage.write(f"{folder}/notes/mine.txt", b"notes")
    storage.write(f"{folder}/step-00000004/data-1.1.0.0.bin", b"of a killed save")
    Path(folder, "step-00000003/.tmp-1234").write_bytes(b"of a killed write")
    Path(folder, "step-00000001/manifest.json").write_bytes(b"damaged")
    before = files_of(folder)
    assert Archive(folder).clean() == 2
    gone = {"step-00000004/data-1.1.0.0.bin", "step-00000003/.tmp-1234"}
    assert before - files_of(folder) == gone
    assert retention.clean(f"{folder}/step-00000003", 3) is False
    with pytest.raises(DamagedError, match="step-00000001/manifest.json is damaged: it does not begin with"):
        Archive(folder).whole(1)
