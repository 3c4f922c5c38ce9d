"""The manifest: what a checkpoint consists of, and the proof that it is whole. FORMAT.md describes it for readers."""

import os
import re
from functools import lru_cache
from math import prod
from typing import Annotated, Any, Literal, TypeVar

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from toolkit import storage
from toolkit.checkpoint.boxes import cover, volume
from toolkit.errors import RunError

FORMAT: Literal[2] = 2
NAME = "manifest.json"
MAX_BYTES = 32 << 20  # of a manifest: one of 100 000 chunks has 20 MiB; whoever sends more wants our memory
MAX_FILE_BYTES = 64 << 20  # of any other file; see plan.FILE_BYTES
MAX_DIMS = 64  # that torch can make

# Every type a parameter may have, under torch's name for it.
DTYPES = {
    name: getattr(torch, name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "complex128",
        "complex64",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ]
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Bytes = Annotated[int, Field(ge=0, le=1 << 62)]
Side = Annotated[tuple[int, int], Field(strict=False)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Name = Annotated[str, Field(max_length=1000)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
# Names that we give, and no other: none can lead out of the folder.
FileName = Annotated[str, Field(pattern=r"^(data|state)-[0-9]+(\.[0-9]+){1,3}\.(bin|json)$", max_length=100)]


class DamagedError(RunError):
    """A checkpoint does not hold what its manifest says. The message names the file."""


class _ImpossibleError(Exception):
    """Ends a validation at the first value that is wrong: pydantic would describe each of millions, in gigabytes."""


def _at_once(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        raise _ImpossibleError(_words(error)) from None


def _words(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(key) for key in first["loc"])
    return f"{place[:200]}: {first['msg'][:200]}"


_AtOnce = WrapValidator(_at_once)
_OF_DIMS: Any = Field(strict=False, max_length=MAX_DIMS, fail_fast=True)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Chunk(_Model):
    """A box of a tensor, row-major and little-endian, at an offset of a file."""

    file: FileName
    offset: Bytes
    box: Annotated[tuple[Side, ...], _OF_DIMS]
    xxh3_128: Checksum


class TensorEntry(_Model):
    """A tensor: the boxes of its chunks hold every element exactly once."""

    dtype: Name
    shape: Annotated[tuple[Bytes, ...], _OF_DIMS]
    chunks: Annotated[tuple[Chunk, ...], Field(strict=False, fail_fast=True)]

    def problem(self) -> str:
        """What is impossible about it, or nothing."""
        if prod(max(1, size) for size in self.shape) > 1 << 60:
            return f"has the impossible shape {self.shape}"
        if self.dtype not in DTYPES:
            return f"has the unknown type {self.dtype!r}"
        if not cover(self.shape, [chunk.box for chunk in self.chunks]):
            return f"has chunks that do not make up its shape {self.shape}"
        return ""

    @property
    def itemsize(self) -> int:
        size: int = DTYPES[self.dtype].itemsize
        return size


class FileEntry(_Model):
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    xxh3_128: Checksum


class Part(_Model):
    """What one rank has written; rank 0 makes the manifest of all parts."""

    files: dict[FileName, Annotated[FileEntry, _AtOnce]] = {}
    tensors: dict[Name, Annotated[TensorEntry, _AtOnce]] = {}
    error: str | None = None


class Manifest(_Model):
    """A whole checkpoint. It exists once this is written, which comes last."""

    format: Literal[2] = FORMAT
    step: Bytes
    samples: Bytes
    world_size: Count
    attempt: Count
    score: float | None
    config_digest: str
    saved_at: str
    versions: dict[Name, Annotated[str, _AtOnce]]
    state: FileName
    files: dict[FileName, Annotated[FileEntry, _AtOnce]]
    tensors: dict[Name, Annotated[TensorEntry, _AtOnce]]

    def encoded(self) -> bytes:
        """The content of the file: its first line is the checksum of the rest. Raises OSError if it is too large."""
        body = b'"manifest":' + self.model_dump_json().encode() + b"}\n"
        content = f'{{"xxh3_128":"{checksum(body)}",\n'.encode() + body
        if len(content) > MAX_BYTES:
            raise OSError(f"its manifest would have {len(content)} bytes; no reader takes more than {MAX_BYTES}")
        return content

    def problem(self) -> str:
        """What is impossible about it, or nothing."""
        if self.state not in self.files:
            return f"{self.state} is not among its files"
        for name, tensor in self.tensors.items():
            if wrong := tensor.problem():
                return f"tensor {name!r} {wrong}"
        return self._problem_of_files()

    def _problem_of_files(self) -> str:
        """The chunks must make up every byte of the files of data, each once."""
        stretches = {name: list[tuple[int, int]]() for name in self.files if name != self.state}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                if chunk.file not in stretches:
                    return f"a chunk of tensor {name!r} lies in {chunk.file}, which is not among its files of data"
                stretches[chunk.file].append((chunk.offset, chunk.offset + volume(chunk.box) * tensor.itemsize))
        for name, found in stretches.items():
            stops = [0, *(stop for _, stop in sorted(found))]
            if stops != [*(start for start, _ in sorted(found)), self.files[name].bytes]:
                return f"the chunks in {name} do not make up its {self.files[name].bytes} bytes"
        return ""


Plain = bool | int | float | str | None


class Group(_Model):
    """Parameters that the optimizer treats alike: what it keeps for them, and what its defaults for that were."""

    parameters: Annotated[list[Name], Field(fail_fast=True)]
    values: dict[Name, Annotated[Plain | list[Plain], _AtOnce]]
    defaults: dict[Name, Annotated[Plain | list[Plain], _AtOnce]]


class Values(_Model):
    """What is no tensor: the file that `state` names."""

    step: Bytes
    best: float | None
    scaler: dict[Name, Annotated[float | int, _AtOnce]]
    trained: Annotated[list[Name], Field(fail_fast=True)]
    optimizer: dict[Name, Annotated[Plain, _AtOnce]]
    tied: dict[Name, Annotated[Name, _AtOnce]]
    skipped: Annotated[list[Bytes], Field(fail_fast=True)] = []
    groups: Annotated[list[Annotated[Group, _AtOnce]], Field(fail_fast=True)] = []

    def encoded(self) -> bytes:
        """The content of the file. What has a default, and is it, is not written: no reader of format 2 needs it."""
        return self.model_dump_json(exclude_defaults=True).encode()


Model = TypeVar("Model", bound=_Model)


def decoded(kind: type[Model], content: bytes) -> Model:
    """A model of JSON. Raises ValueError that says what is wrong with it."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(_words(error)) from None
    except _ImpossibleError as error:
        raise ValueError(str(error)) from None


def checksum(content: bytes | memoryview) -> str:
    """XXH3-128 as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def read(folder: str, step: int) -> Manifest | None:
    """The manifest of a step's folder, None if there is none.

    Raises DamagedError if it is not whole, or its files have other sizes; RunError if another version wrote it.
    """
    url = storage.join(folder, NAME)
    sizes = storage.sizes(folder)
    if NAME not in sizes:
        return None
    if sizes[NAME] > MAX_BYTES:
        raise DamagedError(f"{storage.shown(url)} has {sizes[NAME]} bytes; no manifest is larger than {MAX_BYTES}")
    _refuse_link(url)
    try:
        manifest = parse(storage.read(url, 0, MAX_BYTES))
    except FileNotFoundError:  # removed since
        return None
    except ValueError as error:
        raise DamagedError(f"{storage.shown(url)} is damaged: {error}") from None
    if manifest.step != step:
        raise DamagedError(f"{storage.shown(url)} is that of step {manifest.step}, not of step {step}")
    for name, entry in manifest.files.items():
        if sizes.get(name) != entry.bytes:
            found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            where = storage.shown(storage.join(folder, name))
            raise DamagedError(f"{where} {found}; its manifest says {entry.bytes} bytes")
        _refuse_link(storage.join(folder, name))
    return manifest


def _refuse_link(url: str) -> None:
    """A link may lead out of the folder, to what a checkpoint has no business with."""
    if (path := storage.local_path(url)) and os.path.islink(path):
        raise DamagedError(f"{storage.shown(url)} is a link; a checkpoint consists of files")


@lru_cache(maxsize=2)  # a start looks at each checkpoint several times, and at the newest most
def parse(content: bytes) -> Manifest:
    """The manifest of a file's content. Raises ValueError if it is not whole; RunError if another version wrote it."""
    first, newline, body = content.partition(b"\n")
    match = re.fullmatch(rb'\{"xxh3_128":"([0-9a-f]{32})",', first)
    if not match or not newline:
        if content.startswith(b'{\n "format": 1,'):
            raise RunError(_other_version(1))
        raise ValueError("it does not begin with its checksum" if content else "it is empty")
    if checksum(body) != match[1].decode():
        raise ValueError(f"its XXH3-128 is {checksum(body)}, its first line says {match[1].decode()}")
    version = re.match(rb'"manifest":\{"format":(\d{1,9}),', body)
    if version and int(version[1]) != FORMAT:
        raise RunError(_other_version(int(version[1])))
    manifest = decoded(Manifest, body.removeprefix(b'"manifest":').removesuffix(b"}\n"))
    if problem := manifest.problem():
        raise ValueError(problem)
    return manifest


def _other_version(version: int) -> str:
    return (
        f"the checkpoint has format {version}, this version of toolkit reads {FORMAT}; "
        "use the version that wrote it, or start a new run with --fresh"
    )
