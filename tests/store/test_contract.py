"""What toolkit.storage promises of every store, each promise on real ones."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.store.servers import BUCKET, FaultProxy, S3Server, SftpServer, forget_connections, used
from toolkit import storage
from toolkit.errors import JobError

MIB = 1 << 20
READER = """
import sys
from toolkit import storage
for line in sys.stdin:
    print(storage.read(line.strip()).decode(), flush=True)
"""


@pytest.fixture(params=["local", "memory", "s3", "sftp"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place that holds nothing, in each kind of store."""
    if request.param == "local":
        yield f"{tmp_path}/root"
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}/root"
        storage.remove(f"memory://{tmp_path.name}")
    else:
        yield request.getfixturevalue(f"{request.param}_server").fresh_url()


@pytest.fixture
def s3(s3_server: S3Server) -> str:
    return s3_server.fresh_url()


@pytest.fixture
def broken(proxy: FaultProxy) -> tuple[FaultProxy, str]:
    """A proxy that can break what passes, and a place in the store behind it."""
    return proxy, proxy.fresh_url()


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `count` threads return that begin in the same moment."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@contextmanager
def taking(at_least: float, at_most: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began <= at_most


# what every store promises


def test_what_is_written_is_read_whole_and_in_stretches(root: str) -> None:
    url = storage.join(root, "folder", "file")
    storage.write(url, b"0123456789")
    assert storage.read(url) == b"0123456789"
    assert storage.read(url, 3) == b"3456789"
    assert storage.read(url, 3, 6) == b"345"
    assert storage.read(url, 8, 100) == b"89"
    assert storage.read(url, 10, 20) == storage.read(url, 50, 60) == storage.read(url, 4, 4) == b""


def test_many_files_are_made_durable_together(root: str) -> None:
    for name in ("a", "b"):
        storage.write(storage.join(root, name), b"content", durable=False)
    storage.sync(root, ["a", "b"])
    assert storage.sizes(root) == {"a": 7, "b": 7}


def test_a_buffer_is_filled_from_anywhere_and_short_at_the_end(root: str) -> None:
    url = storage.join(root, "file")
    storage.write(url, b"0123456789")
    buffer = bytearray(b"........")
    assert storage.read_into(url, 2, memoryview(buffer)[1:5]) == 4
    assert buffer == b".2345..."
    assert storage.read_into(url, 7, memoryview(buffer)) == 3
    assert buffer == b"78945..."
    assert storage.read_into(url, 10, memoryview(buffer)) == 0


def test_nothing_is_found_where_nothing_is(root: str) -> None:
    url = storage.join(root, "nothing")
    assert not storage.exists(url)
    assert storage.names(url) == []
    assert storage.sizes(url) == {}
    for reading in (
        storage.read,
        storage.size,
        lambda url: storage.read(url, 1, 1),
        lambda url: storage.read(url, 1, 2),
    ):
        with pytest.raises(FileNotFoundError, match=url):
            reading(url)


def test_names_and_sizes_are_of_what_is_directly_there(root: str) -> None:
    for name, length in {"b": 3, "a": 0, "folder/inside": 5}.items():
        storage.write(storage.join(root, name), b"x" * length)
    assert storage.names(root) == storage.names(root + "/") == ["a", "b", "folder"]
    assert storage.sizes(root) == {"a": 0, "b": 3}
    assert storage.names(storage.join(root, "b")) == []
    assert storage.size(storage.join(root, "b")) == 3
    assert storage.exists(storage.join(root, "folder"))


def test_of_eight_creators_one_wins_and_its_content_stays(root: str) -> None:
    for turn in range(2):
        url = storage.join(root, "locks", str(turn))
        won = at_once(8, lambda number, url=url: storage.create(url, f"creator {number}".encode()))
        assert won.count(True) == 1
        assert storage.read(url) == f"creator {won.index(True)}".encode()
        assert not storage.create(url, b"late")
    assert storage.names(storage.join(root, "locks")) == ["0", "1"]
    assert storage.exclusive_note(root) == ""


def test_create_after_remove_makes_it_again(root: str) -> None:
    url = storage.join(root, "lock")
    assert storage.create(url, b"one")
    storage.remove(url)
    assert storage.create(url, b"two")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_moved_thing_is_there_and_not_here(root: str, what: str) -> None:
    for name in ("folder/file", "folder/more/file", "folders", "file", "files"):
        storage.write(storage.join(root, name), name.encode())
    storage.move(storage.join(root, what), storage.join(root, "new", "place"))
    assert storage.names(root) == sorted({"file", "files", "folder", "folders", "new"} - {what})
    inside = {"file": "", "folder": "more/file"}[what]
    assert (
        storage.read(storage.join(root, "new", "place", inside).rstrip("/"))
        == storage.join(what, inside).rstrip("/").encode()
    )


def test_nothing_cannot_be_moved(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.move(storage.join(root, "nothing"), storage.join(root, "new"))


def test_a_name_is_taken_as_it_is_written(root: str) -> None:
    for name in ("run[12]", "run*", "run?", "run 1", "läuft-走る", "a+b=c&d", "%41", "#1", "'\"", "~"):
        for one in (name, "run1", "A"):
            storage.write(storage.join(root, one, "file"), one.encode())
        assert storage.names(root) == sorted([name, "run1", "A"])
        assert storage.read(storage.join(root, name, "file")) == name.encode()
        assert storage.sizes(storage.join(root, name)) == {"file": len(name.encode())}
        storage.move(storage.join(root, name), storage.join(root, name + "."))
        storage.remove(storage.join(root, name + "."))
        assert storage.names(root) == ["A", "run1"]


def test_what_is_removed_is_gone_and_nothing_else(root: str) -> None:
    for name in ("file", "folder/a", "folder/b/c", "folders"):
        storage.write(storage.join(root, name), b"content")
    for name in ("file", "folder", "nothing"):
        storage.remove(storage.join(root, name))
    assert storage.names(root) == ["folders"]


def test_a_large_object_comes_back_as_it_was(root: str) -> None:
    url, content = storage.join(root, "large"), bytearray(os.urandom(MIB) * 40)
    storage.write(url, memoryview(content))
    storage.write(url, memoryview(content)[1:])
    back = bytearray(len(content) - 1)
    assert storage.read_into(url, 0, memoryview(back)) == len(back)
    assert back == memoryview(content)[1:]
    assert storage.names(root) == ["large"]
    assert storage.abort_uploads(root) == 0


def test_threads_write_at_once(root: str) -> None:
    parts = [os.urandom(MIB) for _ in range(4)]
    at_once(4, lambda number: [storage.write(storage.join(root, f"{number}-{n}"), parts[number]) for n in range(3)])
    assert storage.sizes(root) == {f"{number}-{n}": MIB for number in range(4) for n in range(3)}
    assert all(storage.read(storage.join(root, f"{number}-2")) == parts[number] for number in range(4))


@pytest.mark.parametrize("root", ["local", "s3", "sftp"], indirect=True)
def test_an_overwritten_file_is_seen_at_once_by_another_process(root: str) -> None:
    url = storage.join(root, "file")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with reader:
        assert reader.stdin
        assert reader.stdout
        for content in ("one", "two", "three"):
            storage.write(url, content.encode())
            print(url, file=reader.stdin, flush=True)
            assert reader.stdout.readline().strip() == content


# a write that fails


def test_a_full_disk_leaves_the_old_bytes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = str(tmp_path / "file"), os.write
    storage.write(path, b"old")

    def full(descriptor: int, content: memoryview) -> int:
        if len(content) < 90:
            raise OSError(ENOSPC, "No space left on device")
        return write(descriptor, content[:10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'") as caught:
        storage.write(path, b"x" * 100)
    assert caught.value.errno == ENOSPC
    assert Path(path).read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_upload_cut_off_leaves_the_old_object_and_nothing_else(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    storage.write(storage.join(root, "file"), b"old")
    proxy.fault("reset")
    with storage.patience(1), pytest.raises(OSError, match=f"cannot write {root}/file: .*; tried [2-9] times over 1 s"):
        storage.write(storage.join(root, "file"), b"x" * MIB)
    proxy.fault("pass")
    assert storage.read(storage.join(root, "file")) == b"old"
    assert storage.names(root) == ["file"]
    assert proxy.server.uploads() == []


def test_an_upload_that_ends_before_its_body_leaves_the_old_object(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    for content in (b"new", b"x" * MIB):
        storage.write(storage.join(root, "file"), b"old")
        proxy.fault("bodiless", 1000)
        with storage.patience(1), pytest.raises(OSError, match="cannot write"):
            storage.write(storage.join(root, "file"), content)
        with storage.patience(1), pytest.raises(OSError, match="cannot write"):
            storage.create(storage.join(root, "lock"), content)
        proxy.fault("pass")
        assert storage.read(storage.join(root, "file")) == b"old"
        assert storage.names(root) == ["file"]


def test_a_copy_by_ssh_cut_off_leaves_the_old_file_and_nothing_else(
    sftp_server: SftpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncssh = pytest.importorskip("asyncssh")
    root = sftp_server.fresh_url()
    storage.write(storage.join(root, "file"), b"old")

    async def cut(*_: Any) -> None:
        raise asyncssh.SFTPFailure("no space")

    monkeypatch.setattr(asyncssh.SFTPClientFile, "write", cut)
    with storage.patience(1), pytest.raises(OSError, match="cannot write sftp://.*no space"):
        storage.write(storage.join(root, "file"), b"new")
    assert storage.names(root) == ["file"]
    assert storage.read(storage.join(root, "file")) == b"old"


def test_a_killed_writer_leaves_the_old_object_or_the_new(s3_server: S3Server, s3: str) -> None:
    url = storage.join(s3, "file")
    writing = f"from toolkit import storage\nwhile True: storage.write({url!r}, bytes({8 * MIB}))"
    for pause_s in (0.0, 0.1):
        storage.write(url, b"\1" * 8 * MIB)
        with subprocess.Popen(
            [sys.executable, "-c", writing + "; print(1, flush=True)"], cwd=ROOT, stdout=-1
        ) as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(pause_s)
            writer.kill()
        assert storage.read(url) in (b"\1" * 8 * MIB, bytes(8 * MIB))
    assert storage.names(s3) == ["file"]
    assert s3_server.uploads() == []


def test_unfinished_uploads_of_others_are_aborted_under_a_url_only(s3_server: S3Server, s3: str) -> None:
    folder = s3.removeprefix(f"s3://{BUCKET}/")
    with closing(s3_server.client()) as client:
        for key in (f"{folder}/run/a", f"{folder}/run/b/c", f"{folder}/run2"):
            client.create_multipart_upload(Bucket=BUCKET, Key=key)
    assert storage.abort_uploads(storage.join(s3, "run")) == 2
    assert storage.abort_uploads(storage.join(s3, "run")) == 0
    assert s3_server.uploads() == [f"{folder}/run2"]
    assert storage.abort_uploads(s3) == 1


# a store that fails


def test_eight_times_503_are_ridden_out(broken: tuple[FaultProxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, root = broken
    monkeypatch.setattr("toolkit.storage.connection.LONGEST_PAUSE_S", 0.2)
    proxy.fault("503", 8)
    storage.write(storage.join(root, "file"), b"content")
    assert storage.read(storage.join(root, "file")) == b"content"
    assert len(proxy.requests) == 10  # no other layer tries again


def test_a_connection_that_is_cut_is_ridden_out(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    content = os.urandom(4 * MIB)
    for _ in range(3):
        proxy.fault("cut", 2 * MIB)
        storage.write(storage.join(root, "file"), content)
    assert storage.read(storage.join(root, "file")) == content
    assert proxy.server.uploads() == []


def test_create_knows_its_own_object_when_the_answer_was_lost(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    proxy.fault("deaf", 1)
    assert storage.create(storage.join(root, "lock"), b"mine")
    assert not storage.create(storage.join(root, "lock"), b"mine")


def test_a_store_that_answers_nothing_fails_when_patience_is_over(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    storage.write(storage.join(root, "file"), b"old")
    proxy.fault("hang")
    uses: list[Callable[[str], Any]] = [
        storage.read,
        storage.names,
        storage.exists,
        lambda url: storage.write(url, b"new"),
    ]
    for use in uses:
        with (
            storage.patience(0.5),
            taking(0.3, 3.0),
            pytest.raises(TimeoutError, match=f"{root}/file: no answer; tried"),
        ):
            use(storage.join(root, "file"))
    proxy.fault("pass")
    assert storage.read(storage.join(root, "file")) == b"old"


def test_patience_is_for_all_operations_together(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    proxy.fault("hang")
    with storage.patience(1), taking(0.8, 3.0):
        for _ in range(20):
            with storage.patience(30), pytest.raises(OSError, match="cannot remove"):
                storage.remove(storage.join(root, "file"))


def test_a_slow_line_is_not_a_dead_one(broken: tuple[FaultProxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, root = broken
    monkeypatch.setattr("toolkit.storage.remote.TRY_S", 1.8)
    monkeypatch.setattr("toolkit.storage.budget.PATIENCE_S", 2.0)
    content = os.urandom(MIB) * 24
    proxy.fault("slow", 10 * MIB)
    with taking(2.2, 20.0):
        storage.write(storage.join(root, "file"), content)
    proxy.fault("pass")
    assert len([request for request in proxy.requests if request.startswith("PUT")]) == 1
    assert storage.read(storage.join(root, "file")) == content


def test_a_store_that_is_refused_for_a_while_is_waited_for(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    proxy.fault("refuse")
    timer = threading.Timer(1.0, proxy.fault, ["pass"])
    timer.start()
    with taking(0.9, 8.0):
        storage.write(storage.join(root, "file"), b"content")
    timer.join()


def test_a_killed_server_that_comes_back_is_waited_for(s3_server: S3Server, s3: str) -> None:
    storage.write(storage.join(s3, "file"), b"old")
    s3_server.kill()
    timer = threading.Timer(0.5, s3_server.start)  # and takes seconds to be up
    timer.start()
    storage.write(storage.join(s3, "new"), b"new")
    timer.join()
    assert storage.read(storage.join(s3, "file")) == b"old"
    assert storage.read(storage.join(s3, "new")) == b"new"


def test_revoked_credentials_are_said_at_once_in_words(broken: tuple[FaultProxy, str]) -> None:
    proxy, root = broken
    proxy.fault("403")
    uses: list[Callable[[str], Any]] = [
        storage.read,
        storage.names,
        storage.exists,
        lambda url: storage.write(url, b"new"),
    ]
    for use in uses:
        with taking(0, 3.0), pytest.raises(PermissionError, match=f"cannot .* {root}/file: .*; check the credentials"):
            use(storage.join(root, "file"))


@pytest.mark.parametrize("secret", ["wrong-secret-of-forty-characters-I-mean", None])
def test_wrong_credentials_are_said_without_the_credentials(
    s3: str, monkeypatch: pytest.MonkeyPatch, secret: str | None
) -> None:
    if secret:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    else:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    forget_connections()
    with taking(0, 5.0), pytest.raises(PermissionError, match="check the credentials") as caught:
        storage.write(storage.join(s3, "file"), b"content")
    assert str(secret) not in str(caught.value)


def test_an_unknown_ssh_host_is_refused(sftp_server: SftpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    login = json.loads(sftp_server.environment["FSSPEC_SFTP"])
    Path(login["known_hosts"] + ".none").write_text("")
    changed = {"FSSPEC_SFTP": json.dumps(login | {"known_hosts": login["known_hosts"] + ".none"})}
    with used(changed), pytest.raises(PermissionError, match="Host key is not trusted"):
        storage.read(sftp_server.fresh_url())


def test_a_bucket_that_does_not_exist_is_said_as_a_missing_file(s3_server: S3Server) -> None:
    assert s3_server.url
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/file"):
        storage.write("s3://no-such-bucket/file", b"content")
    with pytest.raises(JobError, match="s3://A B/file is not a URL that can be used"):
        storage.write("s3://A B/file", b"content")


def test_a_server_that_ignores_if_none_match_gives_a_note(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put = storage.s3.S3._put  # what an old server does with the header
    monkeypatch.setattr(storage.s3.S3, "_put", lambda self, path, content, **_: put(self, path, content))
    monkeypatch.setattr(storage.s3, "_exclusive", {})
    assert "no exclusive create" in storage.exclusive_note(s3)
    assert storage.names(s3) == []


# processes


def _read_in_child(url: str, content: bytes, times: int) -> None:
    for _ in range(times):
        assert storage.read(url) == content
        storage.write(f"{url}-{os.getpid()}", content)


@pytest.mark.parametrize("root", ["s3", "sftp"], indirect=True)
def test_a_forked_child_has_connections_of_its_own_while_the_parent_writes(root: str) -> None:
    url, content, ended = storage.join(root, "file"), os.urandom(MIB), threading.Event()
    storage.write(url, content)
    slowest = [0.0]

    def writing() -> None:
        while not ended.is_set():
            began = time.monotonic()
            storage.write(url, content)
            slowest[0] = max(slowest[0], time.monotonic() - began)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(writing)
        try:
            context = multiprocessing.get_context("fork")
            children = [context.Process(target=_read_in_child, args=(url, content, 3)) for _ in range(4)]
            for child in children:
                with taking(0, 1.0):
                    child.start()
            for child in children:
                child.join(60)
        finally:
            ended.set()
        done.result()
    assert [child.exitcode for child in children] == [0] * 4
    assert slowest[0] < 10.0  # no answer was lost to a child
