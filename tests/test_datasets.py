"""The built-in datasets: what they hold, from where they read, and that they work in anyone's DataLoader."""

import gzip
import hashlib
import inspect
import os
import re
import threading
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.test_images import put_cifar, put_images
from tests.test_tables import put_csv
from tests.test_tokens import put_tokens
from toolkit import components, datasets, storage
from toolkit.config import Component
from toolkit.datasets import DATASETS, download
from toolkit.datasets.cifar import Cifar10
from toolkit.datasets.digits import Digits
from toolkit.datasets.download import fetched
from toolkit.datasets.idx import FashionMnist, Mnist
from toolkit.datasets.split import held_out
from toolkit.datasets.synthetic import Synthetic
from toolkit.datasets.table import Table
from toolkit.datasets.text import Text
from toolkit.datasets.tokens import Tokens
from toolkit.errors import JobError, RunError
from toolkit.secret import Secret

POEM = "Größe: a naïve café ☕\nthe quick brown fox jumps over the lazy dog 0123456789\n" * 3
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 5, 4), np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10


def idx_bytes(array: Any) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def put_mnist(root: str, packed: bool = False, stem: str = "train", images: bytes = idx_bytes(IMAGES)) -> str:
    for name, content in (("images-idx3", images), ("labels-idx1", idx_bytes(LABELS))):
        url = storage.join(root, f"{stem}-{name}-ubyte")
        storage.write(url + ".gz" * packed, gzip.compress(content) if packed else content)
    return root


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.fixture
def built_in(tmp_path: Path) -> dict[str, Any]:
    storage.write(str(tmp_path / "poem.txt"), POEM.encode())
    return {
        "digits": Digits(),
        "mnist": Mnist(root=put_mnist(str(tmp_path))),
        "fashion_mnist": FashionMnist(root=str(tmp_path)),
        "text": Text(str(tmp_path / "poem.txt"), context=7, stride=3),
        "cifar10": Cifar10(root=put_cifar(str(tmp_path))),
        "table": Table(put_csv(str(tmp_path)), "y"),
        "token_files": Tokens(put_tokens(str(tmp_path / "shards")), 500, context=7, stride=3),
        "images": Synthetic(size=100, shape=(2, 3)),
        "tokens": Synthetic("tokens", size=100, context=9),
    }


NAMES = ["digits", "mnist", "fashion_mnist", "text", "cifar10", "table", "token_files", "images", "tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_a_gathered_batch_equals_its_items(built_in: dict[str, Any], name: str) -> None:
    dataset, indices = built_in[name], [3, 0, 3, 11]
    items = [dataset[index] for index in indices]
    assert same(dataset.gather(np.array(indices)), [torch.stack(column) for column in zip(*items, strict=True)])


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_dataloader_reads_it_to_its_end(built_in: dict[str, Any], name: str) -> None:
    dataset = built_in[name]
    inputs, targets = (torch.cat(column) for column in zip(*DataLoader(dataset, batch_size=4), strict=True))
    assert same((inputs, targets), dataset.gather(np.arange(len(dataset))))
    assert inputs.shape == (len(dataset), *dataset.input_shape)


@pytest.mark.parametrize("name", NAMES)
def test_beyond_its_end_is_an_index_error(built_in: dict[str, Any], name: str) -> None:
    with pytest.raises(IndexError):
        built_in[name][len(built_in[name])]


@pytest.mark.parametrize(("split", "count"), [("train", 1438), ("test", 359), ("all", 1797)])
def test_digits_have_the_promised_size_shape_and_range(split: Any, count: int) -> None:
    digits = Digits(split)
    assert len(digits) == count
    assert (digits.inputs.shape, digits.inputs.dtype) == ((count, 1, 8, 8), torch.float32)
    assert (digits.inputs.min(), digits.inputs.max()) == (0, 1)
    assert (digits.targets.dtype, digits.targets.unique().tolist()) == (torch.int64, list(range(10)))


def test_some_digits_alone_are_classes_in_their_order() -> None:
    every, some = Digits("test"), Digits("test", (5, 3))
    assert some.num_classes == 2
    for target, digit in enumerate((5, 3)):
        assert torch.equal(some.inputs[some.targets == target], every.inputs[every.targets == digit])
    assert len(some) == ((every.targets == 3) | (every.targets == 5)).sum()


@pytest.mark.parametrize("digits", [(), (3, 10), (3, 3), (-1,)])
def test_digits_that_there_are_not_are_refused(digits: tuple[int, ...]) -> None:
    with pytest.raises(JobError, match="must be some of 0 to 9, each once"):
        Digits(digits=digits)


def test_every_fifth_digit_is_test_and_the_rest_is_train() -> None:
    train, test, whole = Digits("train"), Digits("test"), Digits("all")
    fifth = torch.arange(1797) % 5 == 4
    assert same(test.gather(np.arange(359)), (whole.inputs[fifth], whole.targets[fifth]))
    assert same(train.gather(np.arange(1438)), (whole.inputs[~fifth], whole.targets[~fifth]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_idx_files_are_read_from_any_url_plain_or_gzipped(root: str, packed: bool, split: Any, stem: str) -> None:
    images = Mnist(split, put_mnist(root, packed, stem))
    inputs, targets = images.gather(np.arange(20))
    assert images.input_shape == (1, 5, 4)
    assert same((inputs, targets), (torch.from_numpy(IMAGES)[:, None] / 255, torch.from_numpy(LABELS).long()))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (idx_bytes(IMAGES)[:-1], "truncated"),
        (idx_bytes(IMAGES) + b"0", "too long"),
        (b"PNG and more than sixteen bytes", "not an IDX file"),
        (idx_bytes(LABELS), "not an IDX file"),
        (b"", "starts with nothing"),
        (gzip.compress(idx_bytes(IMAGES))[:-9], "not whole"),
        (idx_bytes(IMAGES[:19]), "19 images .* 20 labels"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, images: bytes, words: str) -> None:
    with pytest.raises(JobError, match=rf"train-images-idx3-ubyte.*{words}"):
        Mnist(root=put_mnist(str(tmp_path), images=images))


def test_a_folder_without_idx_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"{tmp_path.name} has neither train-images-idx3-ubyte nor"):
        Mnist(root=str(tmp_path))


def test_of_many_at_once_one_downloads_and_all_get_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, downloads, got = os.urandom(1000), list[str](), list[bytes]()
    storage.write(str(tmp_path / "far" / "file"), content)
    all_found_nothing, lock, read = threading.Barrier(4), download.fcntl.flock, storage.read
    monkeypatch.setattr(download.fcntl, "flock", lambda *how: (all_found_nothing.wait(60), lock(*how)))
    monkeypatch.setattr(download.storage, "read", lambda url: (downloads.append(url), read(url))[1])
    url, sha256, cache = f"file://{tmp_path}/far/file", hashlib.sha256(content).hexdigest(), str(tmp_path / "near")
    threads = [threading.Thread(target=lambda: got.append(fetched(url, sha256, cache).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [content] * 4
    assert downloads == [url]


def test_what_was_fetched_once_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    words = f"file://{tmp_path}/file", hashlib.sha256(b"data").hexdigest(), str(tmp_path / "cache")
    path = fetched(*words)
    (tmp_path / "file").unlink()
    assert fetched(*words) == path
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize(("content", "words"), [(b"other", "is damaged"), (None, "cannot be downloaded")])
def test_a_failed_download_is_said_and_leaves_nothing(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content:
        (tmp_path / "file").write_bytes(content)
    url = Secret(f"file://{tmp_path}/file", "${env:KEY}/file")
    with pytest.raises(RunError, match=rf"^\$\{{env:KEY\}}/file {words}") as told:
        fetched(url, "0" * 64, str(tmp_path / "cache"))
    assert str(tmp_path) not in str(told.value)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] in (["lock"], [])


@pytest.mark.parametrize("unit", ["characters", "bytes"])
def test_text_decodes_to_what_was_read_from_any_url(root: str, unit: Any) -> None:
    storage.write(storage.join(root, "poem.txt"), POEM.encode())
    text = Text(storage.join(root, "poem.txt"), "all", context=10, unit=unit)
    assert text.decode(torch.from_numpy(text.tokens.astype(np.int64))) == POEM
    assert text.vocab_size == (len(set(POEM)) if unit == "characters" else 256)
    assert len(text.tokens) == (len(POEM) if unit == "characters" else len(POEM.encode()))


@pytest.mark.parametrize(("length", "stride", "starts"), [(41, None, [0, 10, 20, 30]), (40, 10, [0, 10, 20]),
                                                          (13, 1, [0, 1, 2]), (30, 7, [0, 7, 14])])  # fmt: skip
def test_windows_start_every_stride_and_targets_are_one_ahead(
    tmp_path: Path, length: int, stride: int | None, starts: list[int]
) -> None:
    letters = "".join(chr(0x4E00 + place) for place in range(length))  # all different, so a window shows its place
    (tmp_path / "text").write_text(letters, encoding="utf-8")
    windows = Text(str(tmp_path / "text"), "all", context=10, stride=stride)
    decoded = [tuple(map(windows.decode, windows[index])) for index in range(len(windows))]
    assert decoded == [(letters[start : start + 10], letters[start + 1 : start + 11]) for start in starts]


def test_train_and_val_of_a_text_do_not_overlap_and_share_a_vocabulary(tmp_path: Path) -> None:
    letters = "".join(chr(0x4E00 + place) for place in range(100))
    (tmp_path / "text").write_text(letters, encoding="utf-8")
    train, val = (Text(str(tmp_path / "text"), split, context=4, val_fraction=0.2) for split in ("train", "val"))
    assert train.vocab_size == val.vocab_size == 100
    assert (train.tokens.tolist(), val.tokens.tolist()) == (list(range(80)), list(range(80, 100)))


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, "cannot be read"),
        (b"ab\xff", {}, r"not UTF-8 \(byte 2 is 0xff\)"),
        (b"five5", {"context": 5}, "train has 5 tokens; a window needs 6"),
        (b"", {}, "train has 0 tokens"),
        (b"text", {"context": 0}, "context 0"),
        (b"text", {"stride": 0}, "stride 0"),
    ],
)
def test_a_text_that_gives_no_window_is_refused(
    tmp_path: Path, content: bytes | None, options: dict[str, Any], words: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(JobError, match=words):
        Text(str(tmp_path / "text"), **options)


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_a_synthetic_sample_is_a_function_of_seed_and_index(kind: Any) -> None:
    small, large, other = Synthetic(kind, size=9), Synthetic(kind, size=10**12), Synthetic(kind, size=9, seed=1)
    assert same(small[7], large[7])
    assert not torch.equal(small[7][0], small[8][0])
    assert not torch.equal(small[7][0], other[7][0])


def test_a_trillion_synthetic_samples_take_no_memory() -> None:
    tracemalloc.start()
    try:
        dataset = Synthetic(size=10**12, shape=(1, 4, 4))
        inputs, _ = dataset[10**12 - 1]
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert inputs.shape == (1, 4, 4)
    assert len(dataset) == 10**12


def test_synthetic_tokens_count_up_by_a_step_of_one_to_eight() -> None:
    inputs, targets = Synthetic("tokens", size=500, context=16, vocab_size=31).gather(np.arange(500))
    steps = (targets - inputs) % 31
    assert (steps == steps[:, :1]).all()
    assert steps.unique().tolist() == list(range(1, 9))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_noise_that_there_cannot_be_is_refused(noise: float) -> None:
    with pytest.raises(JobError, match=rf"noise is {noise}; it must be at least 0"):
        Synthetic(noise=noise)


def test_synthetic_images_are_a_pattern_a_class_under_bounded_noise() -> None:
    still, noisy = (Synthetic(size=200, shape=(6,), num_classes=3, noise=noise) for noise in (0.0, 0.5))
    patterns, classes = still.gather(np.arange(200))
    assert len(patterns.unique(dim=0)) == len(classes.unique()) == 3
    difference = noisy.gather(np.arange(200))[0] - patterns
    assert 0.45 < difference.abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("size", [2, 3, 10, 1438])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_train_and_held_out_are_disjoint_and_complete(size: int, fraction: float) -> None:
    parts = held_out(range(size), fraction, seed=3)
    samples = [[part[index] for index in range(len(part))] for part in parts]
    assert sorted(samples[0] + samples[1]) == list(range(size))
    assert len(samples[1]) == min(max(round(size * fraction), 1), size - 1)


def test_what_is_held_out_depends_on_the_seed_alone() -> None:
    one, again, other = ([*held_out(range(1000), 0.1, seed)[1]] for seed in (3, 3, 4))
    assert one == again
    assert len({*one} & {*other}) < 30  # 10 by chance
    assert one != sorted(one)


def test_what_is_held_out_is_what_old_runs_held_out() -> None:
    _, val = held_out(range(1438), 0.1, seed=0)
    assert val.original(np.arange(6)).tolist() == [662, 561, 268, 45, 73, 1387]


def test_original_gives_the_numbers_of_the_samples_in_the_whole() -> None:
    _, val = held_out(range(100, 200), 0.2, seed=0)
    assert [100 + number for number in val.original(np.arange(20)).tolist()] == [val[index] for index in range(20)]


def test_a_single_sample_cannot_be_split() -> None:
    with pytest.raises(JobError, match="1 training samples cannot be split"):
        held_out(range(1), 0.5, seed=0)


@pytest.fixture
def two_of_each(tmp_path: Path) -> str:
    """Under a and b: texts, pictures, tables and digits whose numbers mean different things."""
    for side, letters, animals, values in (("a", "abcdefgh", "cde", (1, 2, 3)), ("b", "defgh", "ce", (1, 2, 9))):
        storage.write(str(tmp_path / side / "text"), letters.encode() * 99)
        put_images(str(tmp_path / side / "images"), animals, each=1)
        rows = "".join(f"{value},{'xy'[value % 2]}\n" for value in values)
        storage.write(str(tmp_path / side / "table.csv"), b"size,y\n" + rows.encode())
        put_mnist(str(tmp_path / side))
    return str(tmp_path)


def built(key: str, name: str, args: dict[str, Any], train: Any = None) -> Any:
    return datasets.build(key, Component(name=name, args=args), train)


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (
            ("text", {"path": "{}/a/text", "context": 4}),
            ("text", {"path": "{}/b/text", "context": 4}),
            "its alphabet from 0 on are 'def', and there 'abc'; take both from one file with split",
        ),
        (
            ("image_folder", {"root": "{}/a/images"}),
            ("image_folder", {"root": "{}/b/images"}),
            "its classes from 1 on are ['e'], and there ['d', 'e']; put both folders under one root",
        ),
        (
            ("table", {"path": "{}/a/table.csv", "target": "y"}),
            ("table", {"path": "{}/b/table.csv", "target": "y"}),
            "its scales from 0 on are [['size', 4.0, 3.559",
        ),
        (
            ("table", {"path": "{}/a/table.csv", "target": "y", "split": "train"}),
            ("table", {"path": "{}/b/table.csv", "target": "y", "like": "{}/a/table.csv"}),
            "take both from one file with split, or train on a file with split: all and give its path here as like",
        ),
        (
            ("digits", {"digits": [3, 5]}),
            ("digits", {"digits": [5, 3]}),
            "its classes from 0 on are [5, 3], and there [3, 5]; give both the same digits",
        ),
        (
            ("mnist", {"root": "{}/a"}),
            ("fashion_mnist", {"root": "{}/b"}),
            "its classes from 0 on are ['T-shirt', 'trouser', 'pullover'], and there [0, 1, 2]; make them the same",
        ),
        (
            ("synthetic", {"kind": "tokens", "vocab_size": 9}),
            ("synthetic", {"kind": "tokens", "vocab_size": 8}),
            "its vocab_size is 8, not 9; make them the same",
        ),
    ],
)
def test_a_set_whose_numbers_mean_something_else_than_in_training_is_refused(
    two_of_each: str, train: Any, val: Any, words: str
) -> None:
    (name, args), (other, others) = train, val

    def placed(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value.format(two_of_each) if isinstance(value, str) else value for key, value in values.items()}

    trained = built("data.train", name, placed(args))
    with pytest.raises(JobError, match=re.escape(words)) as refused:
        built("data.val", other, placed(others), trained)
    assert str(refused.value).startswith(f"data.val {other!r} is not like data.train: ")


def test_a_set_whose_numbers_mean_the_same_as_in_training_is_taken(two_of_each: str) -> None:
    text, table = {"path": f"{two_of_each}/a/text", "context": 4}, {"path": f"{two_of_each}/a/table.csv", "target": "y"}
    small = {"path": f"{two_of_each}/small.csv", "target": "y", "like": table["path"]}
    storage.write(small["path"], b"y,size\nx,2\n")
    held = {"split": "test", "test_fraction": 0.4}
    for name, args, others in (
        ("text", text, text | {"split": "val", "context": 8}),
        ("table", table, small),
        ("table", table | held | {"split": "train"}, table | held),
        ("digits", {}, {"split": "test"}),
        ("digits", {"digits": [3, 5]}, {"split": "test", "digits": [3, 5]}),
        ("image_folder", {"root": f"{two_of_each}/a/images", "size": 8}, {"root": f"{two_of_each}/a/images"}),
    ):
        assert built("data.val", name, others, built("data.train", name, args))
    assert built("data.val", "digits", {}, train=range(9)), "of what training does not say there is nothing to compare"


class Knowing(list[Any]):
    """A user's own."""

    def __init__(self, **known: Any) -> None:
        super().__init__([(0, 0)])
        self.__dict__ |= known


@pytest.mark.parametrize(
    ("known", "own", "taken"),
    [
        ({"num_classes": 10}, {"num_classes": 9}, True),  # one class does not occur in it
        ({"num_classes": 9}, {"num_classes": 10}, False),
        ({"classes": [0, 1]}, {"classes": ["0 - zero", "1 - one"]}, True),
        ({"classes": ["a", "b"]}, {"classes": ["b", "a"]}, False),
    ],
)
def test_a_set_of_ones_own_may_see_less_and_name_things_otherwise(
    known: dict[str, Any], own: dict[str, Any], taken: bool
) -> None:
    with nullcontext() if taken else pytest.raises(JobError, match="is not like data.train"):
        built("data.val", f"{__name__}:Knowing", own, Knowing(**known))


def test_a_set_is_known_again_by_its_plain_facts_alone() -> None:
    known = Knowing(num_classes=np.int64(3), input_shape=torch.Size((1, 2)), classes=("a", 1), vocab_size=list.pop)
    assert datasets.facts(known, 7) == {"samples": 7, "num_classes": 3, "input_shape": [1, 2], "classes": ["a", 1]}
    assert datasets.facts(Knowing(classes=[object()], num_classes=1.5), 7) == {"samples": 7}


def put_text(root: str) -> str:
    storage.write(storage.join(root, "text"), POEM.encode())
    return storage.join(root, "text")


TAKE_A_URL = {
    "cifar10": (put_cifar, "root", {}),
    "fashion_mnist": (put_mnist, "root", {}),
    "image_folder": (put_images, "root", {}),
    "mnist": (put_mnist, "root", {}),
    "table": (put_csv, "path", {"target": "y"}),
    "text": (put_text, "path", {}),
    "tokens": (put_tokens, "path", {"vocab_size": 500, "context": 8}),
}


def spoil(url: str) -> None:
    """Make every file below a URL one byte that none of them may be."""
    files = storage.sizes(url)
    for name in storage.names(url):
        if name in files:
            storage.write(storage.join(url, name), b"\xff")
        else:
            spoil(storage.join(url, name))


@pytest.mark.parametrize("name", TAKE_A_URL)
@pytest.mark.parametrize("state", ["whole", "spoilt", "missing"])
def test_words_about_a_secret_url_show_where_it_came_from_and_never_what_it_says(name: str, state: str) -> None:
    root = Secret("memory://hunter2", "${env:KEY}")
    put, argument, args = TAKE_A_URL[name]
    url = put(root)
    if state == "spoilt":
        spoil(root)
    if state == "missing":
        storage.remove(root)
    try:
        dataset = built("data.train", name, args | {argument: url})
        said = dataset.source
        dataset[0]
    except ValueError as error:  # of which a JobError is one
        said = str(error)
        assert state != "whole"
    finally:
        storage.remove(root)
    assert "${env:KEY}" in said
    assert "hunter2" not in said


def test_every_dataset_that_takes_a_url_is_asked_for_its_words_about_it() -> None:
    taken = {name: inspect.signature(components.find("data", name, DATASETS)).parameters for name in DATASETS}
    assert {name for name, arguments in taken.items() if {"path", "root"} & arguments.keys()} == TAKE_A_URL.keys()
