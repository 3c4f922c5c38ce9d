"""Bytes by URL: whole or not at all, on disk and beyond."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import known_implementations

from toolkit import storage
from toolkit.errors import JobError


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


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_access_rights_follow_the_umask(tmp_path: Path, umask: int, rights: int) -> None:
    before = os.umask(umask)
    try:
        storage.write(str(tmp_path / "file"), b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == rights


@pytest.mark.parametrize("use", [storage.read, storage.exists, storage.names, storage.size, storage.remove])
def test_an_unknown_protocol_is_refused_in_words(use: Any) -> None:
    with pytest.raises(JobError, match="gopher://host/x is not a URL that can be used: Protocol not known: gopher"):
        use("gopher://host/x")


def test_a_store_whose_package_is_missing_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"class": "no_such_package.Store", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "nostore", missing)
    with pytest.raises(JobError, match="nostore://b/x needs a package .* install no_such_package"):
        storage.read("nostore://b/x")
