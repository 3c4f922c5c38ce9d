"""Images from CIFAR-10's binary files and from folders: pixels, classes, crops, and files that are damaged."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.campaigns import starts
from tests.conftest import Workplace
from toolkit import storage
from toolkit.datasets import download, images
from toolkit.datasets.cifar import ARCHIVE, FOLDER, RECORD_BYTES, Cifar10
from toolkit.datasets.images import ImageFolder
from toolkit.datasets.loader import TrainingSteps
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.errors import JobError

BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
PICTURE = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    starts.warm()


def cifar_bytes(number: int, records: int = 4) -> bytes:
    """Records of the classes number, number + 1, ..., each with pixels of its own."""
    values = np.random.default_rng(number).integers(0, 256, (records, RECORD_BYTES), np.uint8)
    values[:, 0] = (number + np.arange(records)) % 10
    return values.tobytes()


def put_cifar(root: str) -> str:
    for number, name in enumerate(BATCHES):
        storage.write(storage.join(root, name), cifar_bytes(number))
    return root


def cifar_archive(folder: str = FOLDER) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for number, name in enumerate(BATCHES):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(cifar_bytes(number))
            archive.addfile(entry, io.BytesIO(cifar_bytes(number)))
    return packed.getvalue()


def encoded(pixels: Any = PICTURE, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def put_images(root: str, classes: str = "ab", each: int = 4, size: int = 24) -> str:
    """Folders of pictures of one colour: the first class is the darkest."""
    for number, name in enumerate(classes):
        for place in range(each):
            pixels = np.full((size, size + place, 3), 40 * number + place, np.uint8)
            storage.write(storage.join(root, name, f"{place}.png"), encoded(pixels))
    return root


# -- CIFAR-10


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_is_read_from_any_url_as_files_or_as_archive(root: str, packed: bool) -> None:
    if packed:
        storage.write(storage.join(root, ARCHIVE), cifar_archive())
    else:
        put_cifar(root)
    train, test = Cifar10("train", root), Cifar10("test", root)
    assert (len(train), len(test)) == (20, 4)
    records = np.frombuffer(b"".join(map(cifar_bytes, range(5))), np.uint8).reshape(20, -1)
    inputs, targets = train.gather(np.arange(20))
    assert torch.equal(inputs, torch.from_numpy(records[:, 1:].reshape(20, 3, 32, 32).copy()) / 255)
    assert targets.tolist() == records[:, 0].tolist()
    assert test.targets.tolist() == [5, 6, 7, 8]


def test_cifar_is_fetched_in_pieces_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cifar_archive()
    storage.write(str(tmp_path / "far" / ARCHIVE), archive)
    monkeypatch.setattr(Cifar10, "mirror", f"file://{tmp_path}/far/")
    monkeypatch.setattr(Cifar10, "sha256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(Cifar10, "size_bytes", len(archive))
    monkeypatch.setattr(download, "PIECE_BYTES", 10_000)
    read, asked = storage.read, list[int]()
    monkeypatch.setattr(storage, "read", lambda url, *ends: (asked.append(len(ends)), read(url, *ends))[1])
    assert len(Cifar10(cache=str(tmp_path / "near"))) == 20
    assert asked.count(2) == -(-len(archive) // 10_000) > 1
    storage.remove(str(tmp_path / "far"))
    assert len(Cifar10("test", cache=str(tmp_path / "near"))) == 4


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "test_batch.bin.*; give the folder of CIFAR-10's binary version, or of its archive"),
        ({"test_batch.bin": cifar_bytes(5)[:-1]}, "test_batch.bin is truncated .*: 12291 bytes are not a multiple of"),
        ({"test_batch.bin": b""}, "test_batch.bin is truncated"),
        ({"test_batch.bin": bytes(RECORD_BYTES) + b"\x0a" * RECORD_BYTES}, "record 1 has class 10, .* none of 0..9"),
        ({ARCHIVE: cifar_archive()[:-999]}, "tar.gz is not whole: .*; copy it again"),
        ({ARCHIVE: b"no archive"}, "tar.gz is not whole"),
        ({ARCHIVE: cifar_archive("cifar-10-batches-py")}, "tar.gz: .*not found.*; take the binary version"),
    ],
)
def test_damaged_cifar_files_are_named(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=words):
        Cifar10("test", str(tmp_path))


# -- image folders


def test_classes_are_folders_in_the_order_of_their_names_at_any_url(root: str) -> None:
    folder = ImageFolder(put_images(root, "zab"), size=8)
    storage.write(storage.join(root, "a", "notes.txt"), b"not an image")
    storage.write(storage.join(root, "README.md"), b"not a class")
    folder = ImageFolder(root, size=8)
    assert (folder.classes, folder.num_classes, folder.input_shape) == (["a", "b", "z"], 3, (3, 8, 8))
    assert len(folder) == 12
    inputs, targets = folder.collate_fn([folder[index] for index in range(12)])
    assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    shades = [40 * number + place for number in (1, 2, 0) for place in range(4)]
    expected = torch.tensor(shades)[:, None, None, None].expand(12, 3, 8, 8) / 255
    assert torch.equal(inputs, expected)
    assert folder[0][0].dtype == torch.uint8
    with pytest.raises(IndexError):
        folder[12]


def test_a_split_has_the_classes_of_train_though_it_lacks_some(tmp_path: Path) -> None:
    put_images(str(tmp_path / "train"), "abc")
    put_images(str(tmp_path / "val"), "c")
    val = ImageFolder(str(tmp_path), "val", 8)
    assert (val.num_classes, len(val), val[0][1]) == (3, 4, 2)
    put_images(str(tmp_path / "val"), "d")
    with pytest.raises(JobError, match="val has a folder 'd', which .*train has not; remove it"):
        ImageFolder(str(tmp_path), "val", 8)


def test_the_centre_is_the_middle_seven_eighths_of_the_shorter_side(tmp_path: Path) -> None:
    wide = np.concatenate([PICTURE[:, :30] * 0, PICTURE, PICTURE[:, :30] * 0], axis=1)
    storage.write(str(tmp_path / "a" / "wide.png"), encoded(wide))
    pixels, _ = ImageFolder(str(tmp_path), size=70)[0]
    assert torch.equal(pixels, torch.from_numpy(PICTURE[5:75, 5:75]).permute(2, 0, 1))


def test_random_crops_have_the_shares_and_ratios_of_the_paper() -> None:
    torch.manual_seed(0)
    boxes = np.array([images._random_box(300, 200) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 300 + 1e-9
    assert bottom.max() <= 200 + 1e-9
    shares, ratios = width * height / 60_000, width / height
    assert 0.08 <= shares.min() < 0.1
    assert 0.8 < shares.max() <= 1
    assert 0.75 <= ratios.min() + 1e-9 < 0.77
    assert 1.31 < ratios.max() <= 4 / 3 + 1e-9


def test_a_picture_that_no_crop_fits_into_gives_its_middle() -> None:
    assert images._random_box(1000, 10) == images._central_box(1000, 10)


def test_a_random_crop_is_that_of_its_epoch_and_sample_on_any_rank(tmp_path: Path) -> None:
    for place in range(8):
        storage.write(str(tmp_path / "a" / f"{place}.png"), encoded(np.roll(PICTURE, place, 0)))
    folder = ImageFolder(str(tmp_path), size=8, crop="random")

    def seen(world_size: int, step: int) -> dict[int, Any]:
        found = {}
        for rank in range(world_size):
            sampler = ElasticDistributedSampler(folder, world_size, rank, seed=3, global_batch_size=8)
            for batch in TrainingSteps(folder, sampler)[step]:
                found |= dict(zip(batch.indices.tolist(), batch.input.tolist(), strict=True))
        return found

    assert seen(1, 1) == seen(3, 1)
    assert seen(1, 1) != seen(1, 0)


@pytest.mark.parametrize(
    "content",
    [
        encoded(PICTURE, "jpeg", quality=100, subsampling=0),
        encoded(Image.fromarray(PICTURE).convert("RGBA"), "webp", lossless=True),
        encoded(Image.fromarray(PICTURE).convert("CMYK"), "tiff"),
        encoded(PICTURE, "bmp"),
    ],
    ids=["jpeg", "webp", "tiff", "bmp"],
)
def test_formats_and_colours_become_rgb(tmp_path: Path, content: bytes) -> None:
    storage.write(str(tmp_path / "a" / "picture.jpg"), content)  # what a file is, its bytes say
    pixels, _ = ImageFolder(str(tmp_path), size=70)[0]
    difference = pixels.permute(1, 2, 0).int() - torch.from_numpy(PICTURE[5:75, 5:75]).int()
    assert difference.abs().float().mean() < 12


def test_a_grey_picture_has_three_equal_channels(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "a" / "grey.gif"), encoded(PICTURE[:, :, 0], "gif"))
    pixels, _ = ImageFolder(str(tmp_path), size=70)[0]
    assert torch.equal(pixels, torch.from_numpy(PICTURE[5:75, 5:75, 0]).expand(3, 70, 70))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot identify image file"),
        (b"<html>404</html>", "cannot identify image file"),
        (encoded(kind="eps"), "cannot identify image file .*it must be one of BMP, GIF, JPEG, PNG, TIFF, WEBP"),
        (encoded(kind="ppm"), "cannot identify image file"),
        (encoded(PICTURE, "jpeg")[:999], "truncated"),
        (encoded(PICTURE, "png")[:999], ""),
        (encoded(PICTURE, "png").replace(b"IDAT", b"IDOT", 1), ""),
        (encoded(PICTURE[:, :, 0].astype(np.uint16) * 256), "its pixels are of mode I;16, not of 8 bits; convert it"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_its_path(tmp_path: Path, content: bytes, words: str) -> None:
    storage.write(str(tmp_path / "cat" / "7.png"), content)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}/cat/7.png is no image that can be read .*{words}"):
        ImageFolder(str(tmp_path), size=8)[0]


@pytest.mark.parametrize(
    ("folders", "options", "words"),
    [
        ([], {}, "has no folders; give one that has a folder of images for each class"),
        ([], {"split": "val"}, "train has no folders"),
        (["cat"], {}, "cat has no images; the files of a class end in .bmp, "),
        (["cat"], {"size": 0}, "size is 0 pixels; use at least 1"),
    ],
)
def test_a_folder_that_is_no_folder_of_images_is_refused(
    tmp_path: Path, folders: list[str], options: dict[str, Any], words: str
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(JobError, match=words):
        ImageFolder(str(tmp_path), **options)


def test_an_image_folder_without_pillow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = put_images(str(tmp_path))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(JobError, match=r"image_folder needs pillow .*pip install 'toolkit\[images\]'"):
        ImageFolder(root)


# -- through the command

JOB = """
task: classification
data:
  train: {name: image_folder, args: {root: pets, size: 8, crop: random}}
  val:   {name: image_folder, args: {root: pets, size: 8}}
  global_batch_size: 16
model:     {name: mlp, args: {hidden: [16]}}
optimizer: {name: adamw, args: {lr: 1e-2}}
train:     {max_steps: 6}
log:       {every_steps: 1}
"""
SAMPLER = ElasticDistributedSampler(range(64), global_batch_size=16, seed=0)
FIRST, LATER = (int(SAMPLER.share(step)[1][3]) for step in (0, 2))


@pytest.fixture
def mine(workplace: Workplace) -> Workplace:
    workplace.write("mine.yaml", JOB)
    put_images(str(workplace.folder / "pets"), "ab", each=32)
    return starts.Forked(workplace.folder)


def spoil(mine: Workplace, sample: int) -> str:
    """Cut the file of a sample short, and return its path."""
    path = f"pets/{'ab'[sample // 32]}/{sorted(map(str, range(32)))[sample % 32]}.png"
    (mine.folder / path).write_bytes((mine.folder / path).read_bytes()[:-40])
    return path


def test_training_on_a_folder_with_random_crops_goes_the_same_way_with_workers(mine: Workplace) -> None:
    mine.run("train", "mine.yaml", "run.dir=alone")
    mine.run("train", "mine.yaml", "run.dir=helped", "data.workers=2")
    losses = [[line["train/loss"] for line in mine.metrics(run)] for run in ("alone", "helped")]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_a_damaged_image_of_the_first_batch_is_named_before_anything_is_written(mine: Workplace) -> None:
    path = spoil(mine, FIRST)
    message = mine.refused("train", "mine.yaml", status=1)
    assert f"sample {FIRST} of pets cannot be read: ValueError: {path} is no image that can be read" in message
    assert "mend or remove it" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_that_is_met_later_ends_the_run_by_its_path(mine: Workplace, workers: int) -> None:
    path = spoil(mine, LATER)
    message = mine.run("train", "mine.yaml", "data.val=null", f"data.workers={workers}", "run.dir=run", status=1)
    assert f"sample {LATER} of pets cannot be read: ValueError: {path} is no image" in message
    assert "Traceback" not in message
    assert path in mine.status("run")["reason"]


def test_a_folder_that_is_not_there_is_refused(mine: Workplace) -> None:
    assert "nowhere has no folders" in mine.refused("train", "mine.yaml", "data.train.args.root=nowhere")
