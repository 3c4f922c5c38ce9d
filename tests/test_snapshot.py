"""The code as it was at submission, taken from real git repositories with whatever names git allows."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, Workplace
from toolkit.cluster import snapshot
from toolkit.cluster.snapshot import take
from toolkit.errors import JobError
from toolkit.provenance import source_code

HOSTILE = [
    "plain.py", "with space.py", "quo'te\".py", "new\nline.py", "tab\t.py", "-dash.py", "ünï.py", "a/b/c.py", "*.py",
    "$(x).py", os.fsdecode(b"not-utf8-\xff.py"), "back\\slash.py", " ", "a/.hidden",
]  # fmt: skip


def git(folder: Path, *words: str) -> str:
    as_someone = ["-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", *as_someone, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit of every hostile name, each file holding its own name."""
    root = tmp_path / "repo"
    for name in HOSTILE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "scratch")


def about(taken: snapshot.Snapshot) -> dict[str, Any]:
    return json.loads((Path(taken.root) / "SNAPSHOT.json").read_text())


def files(root: str) -> dict[str, bytes]:
    """Every file below, by name, but for what describes the snapshot."""
    found = {os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names}
    return {name: (Path(root) / name).read_bytes() for name in found - {"SNAPSHOT.json", "SNAPSHOT.diff"}}


def test_every_tracked_file_is_copied_whatever_it_is_called(repository: Path, store: str) -> None:
    taken = take(str(repository), store)
    assert files(taken.root) == {name: os.fsencode(name) for name in HOSTILE}
    assert taken.words == ()
    assert (taken.inside, taken.python_path()) == (taken.root, [taken.root])
    told = about(taken)
    assert (told["commit"], told["root"]) == (git(repository, "rev-parse", "HEAD"), str(repository))
    assert (told["files"], told["bytes"]) == (len(HOSTILE), sum(len(os.fsencode(name)) for name in HOSTILE))


def test_it_is_the_working_tree_and_not_the_commit(repository: Path, store: str) -> None:
    (repository / "plain.py").write_text("changed")
    (repository / "a/b/c.py").unlink()
    (repository / "staged.py").write_text("added")
    git(repository, "add", "staged.py")
    taken = take(str(repository), store)
    found = files(taken.root)
    assert (found["plain.py"], found["staged.py"]) == (b"changed", b"added")
    assert "a/b/c.py" not in found
    diff = (Path(taken.root) / "SNAPSHOT.diff").read_text()
    assert "+changed" in diff
    assert "+added" in diff


def test_what_is_edited_afterwards_is_not_in_it(repository: Path, store: str) -> None:
    taken = take(str(repository), store)
    with (repository / "plain.py").open("r+") as file:  # in place: a hard link would share it
        file.write("EDITED!!")
    assert files(taken.root)["plain.py"] == b"plain.py"
    assert take(str(repository), store).root != taken.root


def test_untracked_files_stay_out_and_are_named_with_the_remedy(repository: Path, store: str) -> None:
    (repository / ".gitignore").write_text("*.log\n")
    git(repository, "add", ".gitignore")
    (repository / "run.log").write_text("ignored")
    for number in range(7):
        (repository / f"new{number}.py").write_text("new")
    (repository / "module").mkdir()
    (repository / "module/x.py").write_text("new")
    taken = take(str(repository), store)
    assert not files(taken.root).keys() - {*HOSTILE, ".gitignore"}
    assert about(taken)["untracked"] == ["module/", *[f"new{number}.py" for number in range(7)]]
    (words,) = taken.words
    assert "module/, new0.py, new1.py, new2.py, new3.py and 3 more; git add what the job needs" in words
    assert "run.log" not in words
    git(repository, "add", "new3.py")
    assert files(take(str(repository), store).root)["new3.py"] == b"new"


def test_a_hostile_untracked_name_cannot_forge_a_line(repository: Path, store: str) -> None:
    (repository / "x\n\x1b[31mjob done").write_text("")
    (words,) = take(str(repository), store).words
    assert words.isprintable()


def test_the_same_code_is_copied_once(repository: Path, store: str) -> None:
    first = take(str(repository), store)
    before = os.stat(os.path.join(first.root, "SNAPSHOT.json"))
    assert take(str(repository), store) == first
    assert os.stat(os.path.join(first.root, "SNAPSHOT.json")).st_mtime_ns == before.st_mtime_ns
    (repository / "plain.py").write_text("changed")
    other = take(str(repository), store)
    git(repository, "checkout", "-q", "plain.py")
    assert take(str(repository), store) == first != other
    assert sorted(os.listdir(store)) == sorted([first.digest, other.digest])


def test_what_git_does_not_call_a_change_is_one(repository: Path, store: str) -> None:
    first = take(str(repository), store)
    git(repository, "config", "core.fileMode", "false")
    (repository / "plain.py").chmod(0o755)
    second = take(str(repository), store)
    git(repository, "update-index", "--assume-unchanged", "plain.py")  # as files of LFS are, expanded or not
    (repository / "plain.py").write_text("expanded")
    third = take(str(repository), store)
    assert (Path(third.root) / "SNAPSHOT.diff").read_text() == ""
    assert files(third.root)["plain.py"] == b"expanded"
    assert len({first.root, second.root, third.root}) == 3


def test_one_that_has_lost_a_file_is_not_used_again(repository: Path, store: str) -> None:
    first = take(str(repository), store)
    (Path(first.root) / "plain.py").unlink()
    second = take(str(repository), store)
    assert second.root != first.root
    assert "plain.py" in files(second.root)
    assert take(str(repository), store) == second


def test_executables_stay_executable_and_symlinks_symlinks(repository: Path, tmp_path: Path, store: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "c.py").write_text("not of the repository")
    (repository / "tool.sh").write_text("#!/bin/sh\n")
    (repository / "tool.sh").chmod(0o700)
    (repository / "near").symlink_to("a/b/c.py")
    (repository / "far").symlink_to(secret)
    (repository / "gone").symlink_to("nowhere")
    git(repository, "add", ".")
    shutil.rmtree(repository / "a/b")
    (repository / "a/b").symlink_to(secret)  # what git tracks as a/b/c.py would be read through it
    taken = take(str(repository), store)
    copy = Path(taken.root)
    assert os.access(copy / "tool.sh", os.X_OK)
    assert not os.access(copy / "plain.py", os.X_OK)
    assert os.readlink(copy / "near") == "a/b/c.py"
    assert os.readlink(copy / "far") == str(secret)
    assert os.readlink(copy / "gone") == "nowhere"
    assert not (copy / "a/b").exists()
    assert [word for word in taken.words if "far" in word and "near" not in word and "gone" not in word]


def test_submodules_are_in_it_with_their_changes(repository: Path, tmp_path: Path, store: str) -> None:
    other = tmp_path / "other"
    git(tmp_path, "init", "-q", str(other))
    (other / "part.py").write_text("part")
    git(other, "add", ".")
    git(other, "commit", "-qm", "first")
    git(repository, "submodule", "add", "-q", str(other), "sub")
    first = take(str(repository), store)
    (repository / "sub/part.py").write_text("PART")
    second = take(str(repository), store)
    assert files(first.root)["sub/part.py"] == b"part"
    assert files(second.root)["sub/part.py"] == b"PART"
    git(repository, "commit", "-qam", "second")
    git(repository, "submodule", "deinit", "-f", "sub")
    hollow = take(str(repository), store)
    assert [word for word in hollow.words if "sub" in word and "git submodule update --init" in word]


def test_the_folder_of_the_submission_is_found_in_the_copy(repository: Path, store: str, tmp_path: Path) -> None:
    (repository / "toolkit/cluster").mkdir(parents=True)
    (repository / "toolkit/cluster/__init__.py").write_text("")
    git(repository, "add", ".")
    (repository / "jobs").mkdir()  # nothing in it is tracked
    link = tmp_path / "link"
    link.symlink_to(repository)
    for folder, inside in (("a/b", "a/b"), ("jobs", "jobs")):
        taken = take(str(link / folder), store)
        assert taken.inside == f"{taken.root}/{inside}"
        assert os.path.isdir(taken.inside)
        assert taken.python_path() == [taken.inside, taken.root]


def test_before_the_first_commit_there_is_a_snapshot_too(tmp_path: Path, store: str) -> None:
    git(tmp_path, "init", "-q", "young")
    (tmp_path / "young/x.py").write_text("x = 1\n")
    git(tmp_path / "young", "add", ".")
    taken = take(str(tmp_path / "young"), store)
    assert files(taken.root) == {"x.py": b"x = 1\n"}
    assert about(taken)["commit"] is None
    assert "+x = 1" in (Path(taken.root) / "SNAPSHOT.diff").read_text()


def test_outside_a_repository_the_files_are_used_where_they_are(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, why in ((os.environ["PATH"], "not a git repository"), (str(tmp_path), "no git on this machine")):
        monkeypatch.setenv("PATH", path)
        taken = take(str(tmp_path), store)
        assert (taken.root, taken.inside, taken.digest) == (str(tmp_path), str(tmp_path), "")
        assert taken.python_path() == [str(tmp_path)]
        (words,) = taken.words
        assert why in words
        assert f"the job will use the files of {tmp_path}" in words
    assert not os.path.exists(store)


def test_too_much_is_refused_with_the_largest_named(repository: Path, store: str) -> None:
    for number in range(6):
        with (repository / f"data{number}.bin").open("wb") as file:
            file.truncate((100 + number) * 2**20)
    git(repository, "add", "-N", ".")
    with (repository / "data5.bin").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(JobError) as refused:
        take(str(repository), store)
    told = str(refused.value)
    assert "at most 1 GiB" in told
    assert told.index("1024.0 MiB  data5.bin") < told.index("104.0 MiB  data4.bin") < told.index("101.0 MiB  data1.bin")
    assert "data0.bin" not in told
    assert "git rm --cached" in told
    assert "--no-snapshot" in told
    assert not os.path.exists(store)


def test_a_copy_that_breaks_off_leaves_nothing(repository: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str, **options: bool) -> None:
        raise OSError(28, "No space left on device", target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(JobError, match="No space left on device"):
            take(str(repository), store)
    assert os.listdir(store) == []
    assert len(files(take(str(repository), store).root)) == len(HOSTILE)


@pytest.mark.parametrize("stands_still_at", [2, 4])
def test_files_that_change_meanwhile_are_copied_again_or_refused(
    repository: Path, store: str, monkeypatch: pytest.MonkeyPatch, stands_still_at: int
) -> None:
    copyfile: Callable[..., object] = shutil.copyfile
    begun = []

    def disturbed(source: str, target: str, **options: bool) -> object:
        if source.endswith("plain.py"):
            begun.append(source)
            if len(begun) < stands_still_at:
                (repository / "ünï.py").write_text(f"edit {len(begun)}")
        return copyfile(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", disturbed)
    if stands_still_at > 3:
        with pytest.raises(JobError, match="change while they are copied"):
            take(str(repository), store)
        assert os.listdir(store) == []
    else:
        assert files(take(str(repository), store).root)["ünï.py"] == b"edit 1"


def test_a_snapshot_kept_in_the_repository_is_not_in_the_next_one(repository: Path) -> None:
    store = str(repository / "scratch/code")
    first = take(str(repository), store)
    assert take(str(repository), store) == first
    assert first.words == ()


def test_a_name_that_the_snapshot_needs_is_refused(repository: Path, store: str) -> None:
    (repository / "SNAPSHOT.json").write_text("{}")
    git(repository, "add", ".")
    with pytest.raises(JobError, match=r"git tracks SNAPSHOT\.json .* rename it"):
        take(str(repository), store)


def test_provenance_tells_of_the_snapshot_and_not_of_the_folder_it_was_taken_from(repository: Path, store: str) -> None:
    (repository / "plain.py").write_text("submitted\n")
    taken, then = take(str(repository / "a"), store), git(repository, "rev-parse", "HEAD")
    git(repository, "commit", "-qam", "second")
    told = source_code(taken.inside)
    assert told["git_commit"] == then != source_code(str(repository))["git_commit"]
    assert "+submitted" in told["git_diff"]
    assert "plain.py" not in source_code(str(repository))["git_diff"]


MINE = """
from torch import nn

print("{}")


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def test_a_job_runs_the_submitted_code_where_it_was_submitted(workplace: Workplace, tmp_path: Path) -> None:
    root = workplace.folder
    workplace.write("mine.py", MINE.format("as submitted"))
    workplace.write("x.yaml", DIGITS.replace("{name: mlp, args: {hidden: [32]}}", "mine:net").replace("40", "2"))
    git(root, "init", "-q")
    git(root, "add", "mine.py", "x.yaml")
    git(root, "commit", "-qm", "first")
    taken = take(str(root), str(tmp_path / "scratch"))
    workplace.write("mine.py", MINE.format("edited since"))
    said = workplace.run("train", "x.yaml", TOOLKIT_CODE=taken.inside, PYTHONSAFEPATH="1", TOOLKIT_IMAGE_COMMIT="abc")
    assert "as submitted" in said
    assert "edited since" not in said
    (attempt,) = json.loads((root / "runs/x/provenance.json").read_text())["attempts"]
    assert (attempt["git_commit"], attempt["git_diff"]) == (git(root, "rev-parse", "HEAD"), "")
    assert attempt["image_commit"] == "abc"


def test_a_file_that_is_called_like_one_of_a_snapshot_is_no_snapshot(repository: Path) -> None:
    (repository / "SNAPSHOT.json").write_text("[]")
    assert source_code(str(repository))["git_commit"] == git(repository, "rev-parse", "HEAD")
