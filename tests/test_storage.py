"""Bytes by URL: whole or not at all, on disk and beyond."""

import errno
import os
import stat
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from toolkit import storage
from toolkit.errors import JobError
from toolkit.secret import Secret


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder by path, by URL, and one that only fsspec can reach."""
    kinds = {"path": f"{tmp_path}/root", "file": f"file://{tmp_path}/root", "memory": f"memory://{tmp_path.name}/root"}
    yield kinds[request.param]
    storage.remove(f"memory://{tmp_path.name}")


def failing(*_: Any) -> None:
    raise OSError("the disk is full")


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"x" * 100_000])
def test_what_is_written_is_read_again(root: str, content: bytes) -> None:
    url = storage.join(root, "new", "folder", "file")
    storage.write(url, b"old and longer than some")
    storage.write(url, content)
    assert storage.exists(url)
    assert storage.size(url) == len(content)
    assert storage.read(url) == content


def test_names_are_those_directly_under_a_url_sorted(root: str) -> None:
    for name in ("b", "a", "folder/inside"):
        storage.write(storage.join(root, name), b"content")
    assert storage.names(root) == storage.names(root + "/") == ["a", "b", "folder"]
    assert storage.names(storage.join(root, "folder")) == ["inside"]


def test_nothing_is_found_where_nothing_is(root: str) -> None:
    url = storage.join(root, "nothing")
    assert not storage.exists(url)
    assert storage.names(url) == []
    for reading in (storage.read, storage.size):
        with pytest.raises(FileNotFoundError):
            reading(url)


def test_remove_takes_a_file_or_a_folder_and_all_under_it_and_nothing_else(root: str) -> None:
    for name in ("file", "folder/a", "folder/b/c", "folders"):
        storage.write(storage.join(root, name), b"content")
    for name in ("file", "folder", "nothing"):
        storage.remove(storage.join(root, name))
    assert storage.names(root) == ["folders"]


def test_remove_takes_a_name_as_it_is_written_and_not_as_a_pattern(root: str) -> None:
    for name in ("run[12]/file", "run1/file", "run*/file", "run2/file"):
        storage.write(storage.join(root, name), b"content")
    storage.remove(storage.join(root, "run[12]"))
    storage.remove(storage.join(root, "run*"))
    assert storage.names(root) == ["run1", "run2"]


def test_only_a_file_on_this_machine_has_a_local_path(root: str, tmp_path: Path) -> None:
    assert storage.local_path(root) == (None if root.startswith("memory") else str(tmp_path / "root"))


def test_a_relative_path_is_one_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write("file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_bytes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    storage.write(str(tmp_path / "file"), b"old")
    monkeypatch.setattr(os, step, failing)
    with pytest.raises(OSError, match="the disk is full"):
        storage.write(str(tmp_path / "file"), b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_content_is_whole_and_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    done, replace, fsync = list[str](), os.replace, os.fsync

    def replacing(old: str, new: str) -> None:
        assert Path(old).read_bytes() == b"whole"
        done.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("disk"), fsync(file)))
    storage.write(str(tmp_path / "file"), b"whole", durable)
    assert done == (["disk", "name", "disk"] if durable else ["name"])  # the second: the folder, which holds the name


def test_sync_brings_every_file_and_then_the_folder_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync = list[str](), os.fsync
    for name in ("a", "b", "c"):
        storage.write(str(tmp_path / name), bytes(2 << 20), durable=False)
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    storage.sync(str(tmp_path), ["a", "b"])
    assert done == [f"{tmp_path}/a", f"{tmp_path}/b", str(tmp_path)]


def test_a_new_folder_is_on_disk_whatever_is_written_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync = list[str](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    storage.write(f"{tmp_path}/new/folder/file", b"content", durable=False)
    assert done == [str(tmp_path), f"{tmp_path}/new"]


def test_a_failed_sync_is_told_by_name_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(str(tmp_path / "a"), b"content", durable=False)
    failures = iter([OSError(errno.EIO, "Input/output error")])  # a second fsync would claim success
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(next(failures)))
    with pytest.raises(OSError, match="Input/output error") as caught:
        storage.sync(str(tmp_path), ["a"])
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_access_rights_follow_the_umask(tmp_path: Path, umask: int, rights: int) -> None:
    before = os.umask(umask)
    try:
        storage.write(str(tmp_path / "file"), b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == rights


def test_a_write_that_takes_little_at_a_time_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    storage.write(str(tmp_path / "file"), b"0123456789" * 5)
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 5


def test_what_is_written_is_not_copied_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, write = bytearray(1 << 20), os.write

    def same(descriptor: int, view: memoryview) -> int:
        assert view.obj is content
        return write(descriptor, view)

    monkeypatch.setattr(os, "write", same)
    storage.write(str(tmp_path / "file"), memoryview(content)[10:])
    assert (tmp_path / "file").stat().st_size == len(content) - 10


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EBUSY])
def test_an_error_of_a_network_disk_that_passes_is_ridden_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    replace, failures = os.replace, [number, number]

    def failing_twice(old: str, new: str) -> None:
        if failures:
            raise OSError(failures.pop(), "not now")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing_twice)
    storage.write(str(tmp_path / "file"), b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_that_does_not_pass_is_said_when_patience_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_always(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing_always)
    with (
        storage.patience(1),
        pytest.raises(
            OSError, match=rf"cannot write {tmp_path}/file: .*Input/output error; tried \d+ times over 1 s"
        ) as caught,
    ):
        storage.write(str(tmp_path / "file"), b"content")
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_an_error_that_stays_is_said_at_once_with_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tries = []

    def failing(old: str, new: str) -> None:
        tries.append(new)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path}/file'") as caught:
        storage.write(str(tmp_path / "file"), b"content")
    assert caught.value.errno == number
    assert len(tries) == 1


def test_where_there_are_no_links_one_creator_wins_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", without)
    assert storage.create(str(tmp_path / "lock"), b"one")
    assert not storage.create(str(tmp_path / "lock"), b"two")
    assert (tmp_path / "lock").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["lock"]


def test_a_link_that_was_made_though_nfs_says_it_was_there_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def answered_twice(old: str, new: str) -> None:
        link(old, new)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answered_twice)
    assert storage.create(str(tmp_path / "lock"), b"one")


def test_only_files_have_sizes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    assert storage.sizes(str(tmp_path)) == {"file": 5, "link": 5}
    with pytest.raises(IsADirectoryError):
        storage.size(str(tmp_path))


def test_remove_takes_a_link_and_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    storage.remove(str(tmp_path / "link"))
    assert os.listdir(tmp_path) == ["folder"]


def test_free_space_is_that_of_the_disk_that_will_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(tmp_path)
    free = storage.free_bytes(str(tmp_path / "not" / "yet" / "there"))
    assert free is not None
    assert abs(free - disk.f_bavail * disk.f_frsize) < 1 << 30
    assert storage.free_bytes("memory://x/y") is None
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=9, f_favail=0, f_bavail=9, f_frsize=9))
    assert storage.free_bytes(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/runs/a?b=c@d", "/runs/a?b=c@d"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("sftp://user@host/run", "sftp://user@host/run"),
        ("sftp://user:pass:w@rd@host:22/run", "sftp://host:22/run"),
        ("https://token@host/file?x=1&sig=abc", "https://host/file?…"),
        ("simplecache::https://user:password@host/a", "simplecache::https://host/a"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("abfs://container/run?sv=1&sig=abc", "abfs://container/run?…"),
        (Secret("s3://bucket/run", "${env:PLACE}"), "${env:PLACE}"),
        (storage.join(Secret("s3://bucket/run", "${env:PLACE}"), "logs", "a"), "${env:PLACE}/logs/a"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, words: str) -> None:
    assert storage.shown(url) == words


def test_an_error_shows_no_secret_nor_does_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://user:password@host/file?token=abc"

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, f"denied for {url} at https://host/a?sig=abc")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    with pytest.raises(OSError, match="cannot write memory://host/file") as caught:
        storage.write(url, b"content")
    text = "".join(traceback.format_exception(caught.value))
    assert "password" not in text.replace(f'url = "{url}"', "")
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("use", [storage.read, storage.exists, storage.names, storage.size, storage.remove])
def test_an_unknown_protocol_is_refused_in_words(use: Any) -> None:
    with pytest.raises(JobError, match="gopher://host/x is not a URL that can be used: Protocol not known: gopher"):
        use("gopher://host/x")


def test_a_store_whose_package_is_missing_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"class": "no_such_package.Store", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "nostore", missing)
    with pytest.raises(JobError, match="nostore://b/x needs a package .* install no_such_package"):
        storage.read("nostore://b/x")
