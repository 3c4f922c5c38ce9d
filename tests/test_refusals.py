"""Wrong input through the real command: a message with key, value and remedy, and nothing written."""

import gzip
import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.campaigns import starts
from tests.conftest import ROOT, Workplace
from toolkit.datasets.download import fetched
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.errors import RunError
from toolkit.storage.budget import patience


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    starts.warm()


@pytest.fixture
def workplace(workplace: Workplace) -> Workplace:
    """One whose commands start in a tenth of the time: there are many here."""
    return starts.Forked(workplace.folder)


MINE = """
import torch
from torch.utils.data import IterableDataset
from toolkit.datasets.idx import IdxImages

class Good:
    num_classes, input_shape, source = 3, (4,), "mine.bin"

    def __init__(self, bad: int = -1):
        self.bad = bad

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((4,), index / 64), index % 3

class WrongClass(Good):
    def __getitem__(self, index):
        return torch.zeros(4), 7 if index == self.bad else 1

class NotFinite(Good):
    def __getitem__(self, index):
        return torch.full((4,), float("nan") if index == self.bad else 0.5), 1

class Raising(Good):
    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("bad sector")
        return super().__getitem__(index)

class Wide(Good):
    def __getitem__(self, index):
        return torch.zeros(5), 1

class Empty(Good):
    def __len__(self):
        return 0

class Within(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 3)])

    def forward(self, inputs):
        return inputs @ self.layers[0].weight.T

class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(4), 1
"""

JOB = """
task: classification
data:
  train: {name: mine:Good}
  global_batch_size: 16
model:     {name: mlp, args: {hidden: []}}
optimizer: {name: sgd, args: {lr: 0.1}}
train:     {max_steps: 8, device: cpu}
log:       {every_steps: 4}
"""


@pytest.fixture
def mine(workplace: Workplace) -> Workplace:
    workplace.write("mine.py", MINE)
    workplace.write("mine.yaml", JOB)
    return workplace


# -- refused from the job file and the command line alone


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "digits.yaml", "train.epoch=3"], ["train.epoch: is an unknown key; did you mean 'epochs'?"]),
        (["train", "digits.yaml", "train.epochs=many"], ["train.epochs: 'many'", "a valid integer"]),
        (["train", "digit.yaml"], ["digit.yaml does not exist; did you mean digits.yaml?"]),
        (["train", "jobs"], ["job file jobs cannot be read: Is a directory"]),
        (
            ["train", "digits.yaml", "--processes", "4", "data.global_batch_size=2"],
            ["data.global_batch_size", "2", "less than the 4 ranks", "use at least 4, or launch.processes=2"],
        ),
        (["train"], ["Missing argument 'JOB'"]),
        (["trian", "digits.yaml"], ["No such command 'trian'"]),
        (["train", "digits.yaml", "--proceses", "2"], ["No such option", "--processes"]),
        (["train", "digits.yaml", "--processes", "0"], ["--processes", "than or equal to 1"]),
    ],
)
def test_a_wrong_command_or_job_file_is_refused(workplace: Workplace, words: list[str], parts: list[str]) -> None:
    message = workplace.refused(*words)
    for part in parts:
        assert part in message


def test_evaluate_refuses_a_folder_that_is_no_run(workplace: Workplace) -> None:
    assert "jobs is no run: it has no config.yaml; give the directory of a run" in workplace.refused("evaluate", "jobs")


# -- refused once the parts are built


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.train=mine:Empty", ["data.train 'mine:Empty' is empty; it needs at least one sample"]),
        ("data.train=mine:Endless", ["'mine:Endless' is an IterableDataset", "no index", "__len__ and __getitem__"]),
        ("data.train=mine:Wide", ["model, data and task do not fit together", "shapes cannot be multiplied"]),
        ("data.val={name: synthetic, args: {num_classes: 5}}", ["data.val 'synthetic' is not like data.train"]),
        ("data.test={name: synthetic, args: {num_classes: 5}}", ["its num_classes is 5, not 3; make them the same"]),
        ("model=mlpp", ["model 'mlpp' is unknown; did you mean 'mlp'? Known: cnn, gpt, mlp, resnet, vit"]),
        ("model.args.hiden=[3]", ["unknown argument 'hiden'; did you mean 'hidden'? Allowed: input_shape"]),
        ("data.train=text", ["data.train 'text': argument 'path' is missing; add it under args"]),
        ("data.train=raising:Data", ["data.train 'raising:Data': its module raised RuntimeError: half", "raising.py"]),
        ("train.device=cuda", ["train.device is cuda, but this machine offers cpu; use one of these or auto"]),
    ],
)
def test_parts_that_do_not_fit_are_refused(mine: Workplace, override: str, parts: list[str]) -> None:
    mine.write("raising.py", "raise RuntimeError('half')\n")
    message = mine.refused("train", "mine.yaml", override, CUDA_VISIBLE_DEVICES="")
    for part in parts:
        assert part in message


def test_a_half_set_environment_is_refused_by_name(workplace: Workplace) -> None:
    message = workplace.refused("train", "digits.yaml", RANK="0")
    for part in ["sets RANK but not ", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "start with torchrun"]:
        assert part in message


def test_another_job_in_the_directory_of_a_run_is_refused(mine: Workplace) -> None:
    mine.run("train", "mine.yaml", "train.max_steps=1")

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (mine.folder / "runs").rglob("*") if path.is_file()}

    before = content()
    message = mine.refused("train", "mine.yaml", "optimizer.args.lr=0.2", "data.global_batch_size=8")
    assert "runs/mine holds a run of another job:" in message
    assert "optimizer.args.lr: 0.1 -> 0.2" in message
    assert "data.global_batch_size: 16 -> 8" in message
    assert "--fresh" in message
    assert content() == before


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.precision=fp16"], ["fp16 does not go with strategy fsdp", "use precision bf16, or strategy ddp"]),
        (["train.channels_last=true"], ["channels_last does not go with strategy fsdp", "leave one of them out"]),
        (["train.grad_compression=bf16"], ["grad_compression is ddp's, and strategy is fsdp", "leave one of them out"]),
        (
            ["train.micro_batch_size=1", "--processes=3"],
            ["train.micro_batch_size 1", "data.global_batch_size 16", "3 ranks", "use at least 2, or strategy ddp"],
        ),
        (
            ["train.precision=bf16", "eval.precision=fp32", "--processes=2"],
            ["eval.precision is fp32", "exchange weights in bf16; use eval.precision=bf16, or train.strategy=ddp"],
        ),
        (
            ["model={name: mine:Within}", "--processes=2"],
            [
                "mixed torch.Tensor and DTensor",
                "a block's weights are there only while it is called as a module",
                "attribute `blocks`",
                "use train.strategy=ddp",
            ],
        ),
        (
            ["train.sync_batch_norm=true", "--processes=2"],
            ["train.sync_batch_norm needs GPUs, and the device is cpu; set it to false"],
        ),
    ],
)
def test_what_does_not_go_with_fsdp_is_refused(mine: Workplace, overrides: list[str], parts: list[str]) -> None:
    message = mine.refused("train", "mine.yaml", "train.strategy=fsdp", *overrides)
    for part in parts:
        assert part in message


# -- files


def idx(*shape: int, cut: int = 0) -> bytes:
    """An IDX file of zeros, without its last `cut` bytes."""
    size = 1
    for length in shape:
        size *= length
    header = bytes((0, 0, 8, len(shape))) + b"".join(length.to_bytes(4, "big") for length in shape)
    return (header + bytes(size))[: len(header) + size - cut]


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PACKED = gzip.compress(idx(64, 4, 4), mtime=0)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            {IMAGES: idx(64, 4, 4, cut=9)},
            ["images-idx3-ubyte is truncated", "1031 bytes", "says 1040", "copy it again"],
        ),
        ({f"{IMAGES}.gz": PACKED[:-9]}, ["images-idx3-ubyte.gz is not whole", "copy it again"]),
        ({IMAGES: b"\x89PNG" + bytes(99)}, ["is not an IDX file of 3 dimension(s): it starts with 89504e47"]),
        ({IMAGES: idx(63, 4, 4)}, ["has 63 images but", "has 64 labels; take both from one source"]),
        ({IMAGES: idx(0, 4, 4), LABELS: idx(0)}, ["data.train 'mnist' is empty"]),
        ({}, ["folder has neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz; give the folder"]),
    ],
)
def test_a_damaged_idx_file_is_refused(mine: Workplace, files: dict[str, bytes], parts: list[str]) -> None:
    (mine.folder / "folder").mkdir()
    for name, content in ({LABELS: idx(64)} | files).items():
        (mine.folder / "folder" / name).write_bytes(content)
    message = mine.refused("train", "mine.yaml", "data.train={name: mnist, args: {root: folder}}")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"to be \xff or not", ["text.txt is not UTF-8 (byte 6 is 0xff); convert it to UTF-8"]),
        (b"to be", ["text.txt: train has 5 tokens; a window needs 129", "longer text or a shorter context"]),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(mine: Workplace, content: bytes, parts: list[str]) -> None:
    (mine.folder / "text.txt").write_bytes(content)
    message = mine.refused("train", "mine.yaml", "data.train={name: text, args: {path: text.txt}}")
    for part in parts:
        assert part in message


class Mirror(BaseHTTPRequestHandler):
    """Serves one file, spoilt in the way that the first folder of the URL names."""

    def do_GET(self) -> None:
        way = self.path.split("/")[1]
        body = PACKED[:-1] + b"?" if way == "damaged" else PACKED[:-9]
        self.send_response(200)
        self.send_header("Content-Length", str(len(PACKED) if way == "cut" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


EXPECTED = hashlib.sha256(PACKED).hexdigest()


@pytest.mark.parametrize(
    ("way", "parts"),
    [
        ("damaged", ["is damaged", hashlib.sha256(PACKED[:-1] + b"?").hexdigest(), f"expected {EXPECTED}", "root"]),
        ("truncated", [f"is damaged: {len(PACKED) - 9} bytes", f"expected {EXPECTED}", "try again"]),
    ],
)
def test_a_download_that_is_not_the_file_leaves_nothing_in_the_cache(
    mine: Workplace, mirror: str, way: str, parts: list[str]
) -> None:
    url = f"{mirror}/{way}/"
    mine.write(
        "mine.py", f"{MINE}\nclass Far(IdxImages):\n    mirror = {url!r}\n    sha256 = {{{IMAGES!r}: {EXPECTED!r}}}"
    )
    message = mine.run("train", "mine.yaml", "data.train={name: mine:Far, args: {cache: cache}}", status=1)
    assert f"{url}{IMAGES}.gz" in message
    for part in parts:
        assert part in message
    assert "Traceback" not in message
    assert [path.name for path in (mine.folder / "cache").rglob("*") if path.is_file()] == ["lock"]
    assert not (mine.folder / "runs").exists()


def test_a_download_that_breaks_off_each_time_leaves_nothing_in_the_cache(mirror: str, tmp_path: Path) -> None:
    url = f"{mirror}/cut/{IMAGES}.gz"
    again = "check the network, or give the folder of the files as root"
    with patience(3), pytest.raises(RunError, match=f"{re.escape(url)} cannot be downloaded .*; {again}"):
        fetched(url, EXPECTED, str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


# -- what can only show while training

SAMPLER = ElasticDistributedSampler(range(64), global_batch_size=16, seed=0)
FIRST, LATER = int(SAMPLER.share(0)[1][0]), int(SAMPLER.share(2)[1][3])


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ("WrongClass", ["class index 7 is outside 0..2, which is what the model can output", "mend or remove it"]),
        ("Raising", ["cannot be read: OSError: bad sector; mend or remove it"]),
    ],
)
def test_a_bad_sample_in_the_first_batch_is_named_before_anything_is_written(
    mine: Workplace, dataset: str, parts: list[str]
) -> None:
    message = mine.refused(
        "train", "mine.yaml", f"data.train={{name: mine:{dataset}, args: {{bad: {FIRST}}}}}", status=1
    )
    for part in [f"sample {FIRST} of mine.bin", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("dataset", "more", "parts"),
    [
        ("WrongClass", [], ["class index 7 is outside 0..2, which is what the model can output; mend or remove it"]),
        ("NotFinite", [], ["its input has a nan or infinite value; mend or remove it"]),
        ("Raising", [], ["cannot be read: OSError: bad sector; mend or remove it"]),
        ("Raising", ["data.workers=2"], ["cannot be read: OSError: bad sector; mend or remove it"]),
        ("Raising", ["--processes", "2"], ["rank ", "cannot be read: OSError: bad sector; mend or remove it"]),
        ("WrongClass", ["--processes", "2"], ["rank ", "class index 7 is outside 0..2"]),
        ("WrongClass", ["data.transforms=[mixup]"], ["class index 7 is outside 0..2"]),
        ("NotFinite", ["data.transforms=[mixup]"], ["its input has a nan or infinite value; mend or remove it"]),
    ],
)
def test_a_bad_sample_met_later_ends_the_run_by_its_number(
    mine: Workplace, dataset: str, more: list[str], parts: list[str]
) -> None:
    override = f"data.train={{name: mine:{dataset}, args: {{bad: {LATER}}}}}"
    message = mine.run("train", "mine.yaml", override, *more, status=1)
    for part in [f"sample {LATER} of mine.bin", *parts]:
        assert part in message
    assert "Traceback" not in message
    status = mine.status("runs/mine")
    assert status["state"] == "failed"
    assert f"sample {LATER} of mine.bin" in status["reason"]


# -- commands that need no torch


@pytest.mark.parametrize("word", ["--help", "--version", "schema"])
def test_a_command_that_needs_no_torch_imports_nothing_heavy(word: str) -> None:
    code = (
        "import sys; sys.argv = ['toolkit', sys.argv[1]]; from toolkit import cli\n"
        "try: cli.main()\n"
        "finally: assert not {'torch', 'numpy', 'fsspec', 'submitit', 'psutil'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, word]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_split_that_does_not_exist_is_refused(workplace: Workplace) -> None:
    workplace.run("train", "digits.yaml", "train.max_steps=1")
    message = workplace.refused("evaluate", "runs/digits", "--split", "train")
    assert "--split is 'train'; it must be val or test" in message
