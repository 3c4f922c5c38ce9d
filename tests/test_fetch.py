"""`toolkit fetch`: a job's data on this machine, verified, and what that took in words."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.campaigns import starts
from tests.conftest import Workplace
from tests.test_datasets import idx_bytes
from tests.test_images import cifar_archive

IMAGES = idx_bytes(np.zeros((64, 4, 4), np.uint8))
LABELS = idx_bytes(np.arange(64, dtype=np.uint8) % 10)
FILES = {
    "train-images-idx3-ubyte.gz": IMAGES,
    "train-labels-idx1-ubyte.gz": LABELS,
    "t10k-images-idx3-ubyte.gz": IMAGES,
    "t10k-labels-idx1-ubyte.gz": LABELS,
    "cifar-10-binary.tar.gz": cifar_archive(),
}

MINE = """
from toolkit.datasets.cifar import Cifar10
from toolkit.datasets.idx import IdxImages

class Far(IdxImages):
    mirror = {url!r}
    sha256 = {sums!r}

class Photographs(Cifar10):
    mirror = {url!r}
    sha256 = {sums[cifar-10-binary.tar.gz]!r}
    size_bytes = {size}
"""

JOB = """
task: classification
data:
  train: {name: mine:Far, args: {cache: cache}}
  val:   {fraction: 0.1}
  test:  {name: mine:Far, args: {split: test, cache: cache}}
  global_batch_size: 16
model:     mlp
optimizer: sgd
train:     {max_steps: 2}
"""


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    starts.warm()


class Mirror(BaseHTTPRequestHandler):
    """Serves the files, whole or in the ranges that are asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.asked.append(name)
        content = FILES[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(FILES[self.path.strip("/")])))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mine(workplace: Workplace) -> Iterator[Workplace]:
    """A job whose data lie on a server."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    sums |= {name.removesuffix(".gz"): value for name, value in sums.items()}
    Mirror.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        size = len(FILES["cifar-10-binary.tar.gz"])
        workplace.write("mine.py", MINE.format(url=url, sums=sums, size=size))
        workplace.write("mine.yaml", JOB)
        yield starts.Forked(workplace.folder)
        server.shutdown()
        thread.join()


def kept(folder: Path) -> dict[str, bytes]:
    files = [path for path in (folder / "cache").rglob("*") if path.is_file() and path.name != "lock"]
    return {path.name: path.read_bytes() for path in files}


def test_what_is_fetched_is_said_and_then_there_without_a_network(mine: Workplace) -> None:
    said = mine.run("fetch", "mine.yaml")
    assert said.count(": fetched, verified, 1040 bytes in cache/") == 2
    assert said.count(": fetched, verified, 72 bytes in cache/") == 2
    assert "data.train: 64 samples of mine:Far\ndata.test: 64 samples" in said
    assert kept(mine.folder) == {name: content for name, content in FILES.items() if "idx" in name}
    asked = len(Mirror.asked)
    mine.run("train", "mine.yaml", "run.dir=run")
    assert mine.run("fetch", "mine.yaml").count(": there already, verified, ") == 4
    assert len(Mirror.asked) == asked == 4


def test_a_kept_file_that_was_damaged_is_fetched_again(mine: Workplace) -> None:
    mine.run("fetch", "mine.yaml")
    (images,) = (mine.folder / "cache").rglob("train-images*")
    images.write_bytes(images.read_bytes()[:-1] + b"?")
    said = mine.run("fetch", "mine.yaml")
    assert "train-images-idx3-ubyte.gz: was damaged, fetched again, 1040 bytes" in said
    assert said.count("there already, verified") == 3
    assert images.read_bytes() == IMAGES


def test_an_archive_that_two_sets_share_is_fetched_once_in_pieces(mine: Workplace) -> None:
    sets = [
        f"data.{part}={{name: mine:Photographs, args: {{split: {part}, cache: cache}}}}" for part in ("train", "test")
    ]
    said = mine.run("fetch", "mine.yaml", *sets)
    assert said.count("cifar-10-binary.tar.gz: fetched, verified") == 1
    assert "data.train: 20 samples" in said
    assert "data.test: 4 samples" in said
    assert kept(mine.folder) == {"cifar-10-binary.tar.gz": FILES["cifar-10-binary.tar.gz"]}


def test_data_that_lie_elsewhere_are_looked_at(mine: Workplace) -> None:
    assert "data.train: 266 samples of table" in mine.run("fetch", "jobs/table_mlp.yaml")
    message = mine.refused("fetch", "jobs/table_mlp.yaml", "data.train.args.path=nowhere.csv")
    assert "table nowhere.csv cannot be read" in message
    message = mine.refused("fetch", "jobs/table_mlp.yaml", "data.test.args.features=[island]")
    assert "data.test 'table' is not like data.train: its columns from 0 on are ['island=Biscoe'" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.train.args.splitt=test", "unknown argument 'splitt'; did you mean 'split'?"),
        ("data.test=cifar100", "data.test 'cifar100' is unknown; did you mean 'cifar10'?"),
        ("model=nlp", "model 'nlp' is unknown; did you mean 'mlp'?"),
        ("train.max_step=1", "max_step"),
    ],
)
def test_a_wrong_job_is_refused_with_nothing_fetched(mine: Workplace, change: str, words: str) -> None:
    assert words in mine.refused("fetch", "mine.yaml", change)
    assert not Mirror.asked


def test_a_file_that_is_not_the_one_expected_is_refused_and_not_kept(mine: Workplace) -> None:
    text = (mine.folder / "mine.py").read_text()
    mine.write("mine.py", text.replace(hashlib.sha256(LABELS).hexdigest(), "0" * 64))
    message = mine.run("fetch", "mine.yaml", status=1)
    assert "train-labels-idx1-ubyte.gz is damaged: 72 bytes with SHA-256" in message
    assert "Traceback" not in message
    assert kept(mine.folder) == {"train-images-idx3-ubyte.gz": IMAGES}
