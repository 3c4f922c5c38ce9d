"""Image files in folders: a class a folder."""

import io
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from toolkit import storage
from toolkit.errors import JobError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow knows others, and for EPS would run Ghostscript
SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
MARGIN = 8 / 7  # the shorter side before the centre is cut out, over the size: 256 to 224


class ImageFolder(Dataset[Any]):
    """Inputs (3, size, size), targets int64: the number of the image's folder, in the order of the folders' names.

    `root`: fsspec URL of the folder of folders. With `split`, images are those of `root/split`, and classes the folders
    of `root/train`, so that a class has one number in all splits.

    `crop`: `center` scales the shorter side to 8/7 of `size` and cuts the middle out; `random` cuts out 8% to 100% of
    the image with a ratio of sides of 3/4 to 4/3 (C. Szegedy et al., "Going Deeper with Convolutions", CVPR 2015),
    drawn from torch's global generator, which the loader seeds from (seed, epoch, sample). What is held out of a
    training set by a fraction is cropped as the set is.

    A sample is uint8, as the file has it (an orientation in EXIF is not looked at); `collate_fn` makes of samples a
    batch in 0..1, float32. There is no `gather`: decoding the images, one by one, is most of the time.
    """

    def __init__(
        self, root: str, split: str | None = None, size: int = 224, crop: Literal["center", "random"] = "center"
    ) -> None:
        _pillow()
        if size < 1:
            raise JobError(f"size is {size} pixels; use at least 1")
        self.size, self.crop = size, crop
        self.folder = storage.join(root, split) if split else root
        self.source = storage.shown(self.folder)
        self.classes = _folders(storage.join(root, "train") if split else root)
        self.num_classes, self.input_shape = len(self.classes), (3, size, size)
        there = _folders(self.folder) if split else self.classes
        if others := sorted(set(there) - set(self.classes)):
            where = storage.shown(storage.join(root, "train"))
            raise JobError(f"{self.source} has a folder {others[0]!r}, which {where} has not; remove it")
        names = [_images(storage.join(self.folder, name)) if name in there else [] for name in self.classes]
        self.targets = np.repeat(np.arange(len(names)), [len(each) for each in names])
        self.names: NDArray[np.bytes_] = np.array([name.encode() for each in names for name in each], np.bytes_)

    def url(self, index: int) -> str:
        """Where an image lies."""
        return storage.join(self.folder, self.classes[self.targets[index]], self.names[index].decode())

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(3, size, size) uint8 and the class. Raises ValueError that names a file that is no whole image."""
        url = self.url(index)
        pixels = torch.from_numpy(self._pixels(url, storage.read(url)))
        return pixels.permute(2, 0, 1), int(self.targets[index])

    @staticmethod
    def collate_fn(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, targets = zip(*samples, strict=True)
        return torch.stack(images).float().div_(255), torch.tensor(targets)

    def _pixels(self, url: str, content: bytes) -> NDArray[np.uint8]:
        """(size, size, 3) of an image file."""
        pillow = _pillow()
        try:
            with pillow.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"its pixels are of mode {image.mode}, not of 8 bits; convert it")
                rgb = image.convert("RGB")
        # What Pillow raises depends on the format and on where the damage is; a bomb is an image of 180 megapixels.
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, pillow.DecompressionBombError) as error:
            raise ValueError(
                f"{storage.shown(url)} is no image that can be read ({error}); it must be one of {', '.join(FORMATS)}"
            ) from error
        box = _random_box(*rgb.size) if self.crop == "random" else _central_box(*rgb.size)
        return np.array(rgb.resize((self.size, self.size), pillow.Resampling.BILINEAR, box))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise JobError(f"image_folder needs pillow ({error}); pip install 'toolkit[images]'") from error
    return Image


def _folders(url: str) -> list[str]:
    """The names of the folders in a folder, sorted."""
    files = storage.sizes(url)
    folders = [name for name in storage.names(url) if name not in files and not name.startswith(".")]
    if not folders:
        raise JobError(f"{storage.shown(url)} has no folders; give one that has a folder of images for each class")
    return folders


def _images(url: str) -> list[str]:
    """The names of the images in a folder, sorted."""
    names = [name for name in storage.names(url) if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    if not names:
        raise JobError(
            f"{storage.shown(url)} has no images; the files of a class end in {', '.join(ENDINGS)}: "
            "put some there, or remove the folder"
        )
    return names


def _central_box(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the square in the middle."""
    side = min(width, height) / MARGIN
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random share of an image; the middle, where ten tries do not fit into it."""
    for _ in range(TRIES):
        share, ratio, across, down = torch.rand(4).tolist()
        area = width * height * (SCALE[0] + share * (SCALE[1] - SCALE[0]))
        sides = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio  # uniform in its logarithm: as often upright as lying
        wide, high = (area * sides) ** 0.5, (area / sides) ** 0.5
        if wide <= width and high <= height:
            left, top = (width - wide) * across, (height - high) * down
            return left, top, left + wide, top + high
    return _central_box(width, height)
