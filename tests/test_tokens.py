"""Files of tokens: what a window is, wherever they lie, and that no token beyond the vocabulary reaches a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.campaigns import starts
from tests.conftest import Workplace
from toolkit import storage
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.tokens import Tokens, TokensError
from toolkit.errors import JobError


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    starts.warm()


@pytest.fixture
def mine(workplace: Workplace) -> Workplace:
    """A job that trains on tokens.bin, in 16 windows a step of the 64 there are."""
    workplace.write("mine.yaml", JOB)
    return starts.Forked(workplace.folder)


JOB = """
task: language_modeling
data:
  train: {name: tokens, args: {path: tokens.bin, vocab_size: 50, context: 8}}
  global_batch_size: 16
model:     {name: gpt, args: {layers: 1, heads: 1, width: 8}}
optimizer: sgd
train:     {max_steps: 4}
"""
LATER = int(ElasticDistributedSampler(range(64), global_batch_size=16, seed=0).share(2)[1][3])


def put_tokens(root: str, sizes: tuple[int, ...] = (30, 5, 41), dtype: str = "<u2") -> str:
    """Files of tokens that count up through all of them."""
    tokens = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for number, part in enumerate(tokens):
        storage.write(storage.join(root, f"part-{number}.bin"), part.astype(dtype).tobytes())
    return root


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_count_through_every_file_and_over_no_end(root: str, dtype: Any) -> None:
    tokens = Tokens(put_tokens(root, dtype="<u2" if dtype == "uint16" else "<u4"), 76, 10, dtype=dtype)
    inputs, targets = tokens.gather(np.arange(len(tokens)))
    assert inputs[:, 0].tolist() == [0, 10, 35, 45, 55, 65]  # a window of 11 has no place in the second file
    assert (inputs == inputs[:, :1] + torch.arange(10)).all()
    assert (targets == inputs + 1).all()


def test_a_stride_makes_windows_overlap(tmp_path: Path) -> None:
    windows = Tokens(put_tokens(str(tmp_path), (14,)), 14, context=10, stride=1)
    assert windows.gather(np.arange(len(windows)))[0][:, 0].tolist() == [0, 1, 2, 3]


def test_a_file_here_is_mapped_and_one_elsewhere_read_in_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (np.arange(100_000) % 50).astype("<u2").tobytes()
    far = f"memory://{tmp_path.name}.bin"
    for url in (far, str(tmp_path / "near.bin")):
        storage.write(url, content)
    read, asked = storage.read, list[tuple[int, int | None]]()
    monkeypatch.setattr(
        storage, "read", lambda url, start=0, end=None: asked.append((start, end)) or read(url, start, end)
    )
    near, there = (Tokens(url, 50, context=8) for url in (str(tmp_path / "near.bin"), far))
    asked.clear()
    same = [
        (one == other).all() for one, other in zip(near.gather(np.array([9])), there.gather(np.array([9])), strict=True)
    ]
    storage.remove(far)
    assert all(same)
    assert asked == [(144, 162)]  # of the far file alone, and of its 200 kB nine tokens


@pytest.mark.parametrize(("number", "vocab_size"), [(50, 50), (65535, 50_000)])
def test_a_token_beyond_the_vocabulary_is_named_with_file_and_place(
    tmp_path: Path, number: int, vocab_size: int
) -> None:
    tokens = np.zeros(81, "<u2")
    tokens[43] = number
    storage.write(str(tmp_path / "t.bin"), tokens.tobytes())
    dataset = Tokens(str(tmp_path / "t.bin"), vocab_size, context=8)
    with pytest.raises(
        TokensError, match=rf"t.bin: token {number} at place 43 is not below vocab_size {vocab_size}; give"
    ):
        dataset.gather(np.array([1, 5]))


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, "file cannot be read: .*No such file"),
        (bytes(101), {}, "has 101 bytes, which is no whole number of tokens of 2 bytes; copy it again, or set dtype"),
        (b"\x93NUMPY" + bytes(100), {}, "is a .npy file; write the bare tokens"),
        (bytes(8), {}, "has 4 uint16 tokens in 1 file.s.; a window needs 9 in one: use longer files or a shorter"),
        (b"", {}, "has 0 uint16 tokens"),
        (bytes(100), {"context": 0}, "context 0, stride None and vocab_size 9 must all be at least 1"),
        (bytes(100), {"stride": 0}, "stride 0"),
        (bytes(98) + b"\x09\x00", {"context": 7, "stride": 1}, "token 9 at place 49 is not below vocab_size 9"),
    ],
)
def test_what_is_no_file_of_tokens_is_refused(
    tmp_path: Path, content: bytes | None, options: dict[str, Any], words: str
) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(JobError, match=words):
        Tokens(str(tmp_path / "file"), **{"vocab_size": 9, "context": 8, **options})


def test_a_folder_without_files_of_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(JobError, match="has no files that end in .bin; put some there"):
        Tokens(str(tmp_path), 9)


def test_a_wrong_vocabulary_is_refused_before_anything_is_written(mine: Workplace) -> None:
    (np.arange(513) % 50).astype("<u2").tofile(mine.folder / "tokens.bin")
    assert "token 7 at place 7 is not below vocab_size 7" in mine.refused(
        "train", "mine.yaml", "data.train.args.vocab_size=7"
    )
    assert "argument 'vocab_size' is missing" in mine.refused(
        "train", "mine.yaml", "data.train={name: tokens, args: {path: tokens.bin}}"
    )


def test_a_token_beyond_the_vocabulary_that_is_met_later_ends_the_run_by_its_place(mine: Workplace) -> None:
    tokens = np.zeros(513, "<u2")
    tokens[8 * LATER + 3] = 50
    tokens.tofile(mine.folder / "tokens.bin")
    message = mine.run("train", "mine.yaml", "run.dir=run", status=1)
    assert f"sample {LATER} of tokens.bin cannot be read: TokensError: tokens.bin: token 50" in message
    assert f"at place {8 * LATER + 3} is not below vocab_size 50" in message
    assert "Traceback" not in message
    assert mine.status("run")["state"] == "failed"
