"""A job runs the code that was there when it was submitted, whatever is edited while it waits.

A snapshot is a copy of every file that git tracks, as it stands in the working tree. It lies in a folder named after
what is in it, with SNAPSHOT.json and SNAPSHOT.diff, which `toolkit.provenance.source_code` reads.
"""

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from toolkit.errors import JobError

MAX_BYTES = 2**30
ABOUT, DIFF = "SNAPSHOT.json", "SNAPSHOT.diff"
GIT_TIMEOUT_S = 300
_AT_ONCE = 8  # a network file system is slow at each file, not at many
_TRIES = 3


@dataclass(frozen=True)
class Snapshot:
    """Where the code of a job lies: in a copy, or, if `digest` is empty, where it always was."""

    root: str  # the copy of the repository
    inside: str  # what in it corresponds to the folder of the submission
    words: tuple[str, ...]  # what the user should know
    digest: str
    ours: bool = False  # whether this package is in it

    def python_path(self) -> list[str]:
        """The folders that the job's PYTHONPATH begins with: the second one, if any, has this package."""
        return [self.inside, *[self.root] * (self.ours and self.root != self.inside)]


@dataclass(frozen=True)
class _Tree:
    """A working tree at one moment."""

    root: str
    commit: str | None  # None before the first
    diff: bytes
    modes: dict[str, int]  # of each tracked file and symlink that exists
    sizes: dict[str, int]
    untracked: list[str]
    hollow: list[str]  # submodules that are not checked out
    digest: str


class _NoRepositoryError(Exception):
    """Why there is nothing to copy, in words."""


class _ChangedError(Exception):
    """The working tree is not what it was when the copy began."""


def take(cwd: str, to: str, write: bool = True) -> Snapshot:
    """Copy the repository that `cwd` lies in to a new folder of the folder `to`, all of it or nothing.

    Tracked files are copied as they stand in the working tree, those of submodules too; ignored and untracked ones are
    not. A snapshot that is there already is used again. Outside of a repository nothing is copied, and words say so.
    With `write=False` nothing is copied at all, and what would be is told.
    Raises JobError if there is more than 1 GiB of it, if it does not stand still, or cannot be read or written.
    """
    cwd, to = os.path.realpath(cwd), os.path.realpath(to)
    try:
        root = os.fsdecode(_git(cwd, "rev-parse", "--show-toplevel").removesuffix(b"\n"))
    except _NoRepositoryError as why:
        words = f"no snapshot of the code: {why}; the job will use the files of {cwd} as they are when it runs"
        return Snapshot(cwd, cwd, (words,), "")
    try:
        tree, copy = _standing_still(root, to) if write else _imagined(root, to)
        inside = os.path.normpath(os.path.join(copy, os.path.relpath(cwd, root)))
        if write:
            os.makedirs(inside, exist_ok=True)
    except OSError as error:
        raise JobError(f"the code of {root} cannot be copied to {to}: {error}; mend that, or {_OTHERWISE}") from error
    except _NoRepositoryError as why:
        raise JobError(f"the code of {root} cannot be copied: {why}; mend that, or {_OTHERWISE}") from None
    return Snapshot(copy, inside, tuple(_warnings(tree)), tree.digest, _OURS in tree.modes)


_OURS = "toolkit/cluster/__init__.py"
_OTHERWISE = "have the job use the files where they are: --no-snapshot"


def _standing_still(root: str, to: str) -> tuple[_Tree, str]:
    """(the tree, the folder of its copy), once nothing has changed while it was copied."""
    for _ in range(_TRIES):
        try:
            tree = _look(root, to)
            return tree, _copied(tree, to)
        except (_ChangedError, FileNotFoundError):
            continue
    raise JobError(f"the files of {root} change while they are copied; stop what writes there, or {_OTHERWISE}")


def _imagined(root: str, to: str) -> tuple[_Tree, str]:
    tree = _look(root, to)
    return tree, os.path.join(to, tree.digest)


def _look(root: str, to: str) -> _Tree:
    try:
        commit = os.fsdecode(_git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip())
    except _NoRepositoryError:
        commit = None
    base = commit or os.fsdecode(_git(root, "hash-object", "-t", "tree", "--stdin").strip())  # the empty tree
    diff = _git(
        root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "--submodule=diff",
        "--ignore-submodules=untracked", base, "--",
    )  # fmt: skip
    tracked = sorted({*_names(_git(root, "ls-files", "-z", "--cached", "--recurse-submodules"))})
    others = ("ls-files", "-z", "--others", "--exclude-standard", "--directory", "--no-empty-directory")
    untracked = [
        name
        for name in _names(_git(root, *others))
        if not (to + "/").startswith(os.path.join(root, name)) and not os.path.join(root, name).startswith(to + "/")
    ]
    found = dict(_existing(root, tracked))
    files = {name: about for name, about in found.items() if not stat.S_ISDIR(about.st_mode)}
    modes = {name: about.st_mode for name, about in files.items()}
    sizes = {name: about.st_size for name, about in files.items()}
    _refuse(root, sizes)
    # Not of the diff alone: whether git has expanded a file (LFS) is no change to it, nor what it was told to overlook.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        contents = list(pool.map(lambda name: _content(os.path.join(root, name), modes[name]), modes))
    known = json.dumps([commit, hashlib.sha256(diff).hexdigest(), list(modes), contents]).encode()
    digest = hashlib.sha256(known).hexdigest()[:24]
    return _Tree(root, commit, diff, modes, sizes, untracked, sorted({*found} - {*files}), digest)


def _names(listing: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listing.split(b"\0") if name]


def _existing(root: str, names: Sequence[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Those of some files that exist, as git sees it: nothing exists behind a symlink that stands for a folder."""
    real = {"": True}

    def is_real(folder: str) -> bool:
        if folder not in real:
            real[folder] = is_real(os.path.dirname(folder)) and not os.path.islink(os.path.join(root, folder))
        return real[folder]

    for name in names:
        try:
            about = os.lstat(os.path.join(root, name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        kinds = (stat.S_ISREG, stat.S_ISLNK, stat.S_ISDIR)
        if is_real(os.path.dirname(name)) and any(is_kind(about.st_mode) for is_kind in kinds):
            yield name, about


def _content(path: str, mode: int) -> str:
    """What tells a file from another one of its name."""
    if stat.S_ISLNK(mode):
        return "-> " + os.readlink(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() + " x" * bool(mode & stat.S_IXUSR)


def _refuse(root: str, sizes: Mapping[str, int]) -> None:
    if (total := sum(sizes.values())) > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        lines = [f"\n  {sizes[name] / 2**20:.1f} MiB  {_shown(name)}" for name in largest]
        raise JobError(
            f"git tracks {total / 2**30:.2f} GiB in {root}; a snapshot of the code has at most "
            f"{MAX_BYTES / 2**30:g} GiB. The largest files:{''.join(lines)}\n"
            f"data does not belong in git: git rm --cached it and name it in .gitignore; or {_OTHERWISE}"
        )
    if taken := sorted({ABOUT, DIFF} & sizes.keys()):
        raise JobError(f"git tracks {taken[0]} in {root}, a name that a snapshot needs; rename it, or {_OTHERWISE}")


def _copied(tree: _Tree, to: str) -> str:
    """The folder of a whole copy; an old one that has lost files (scratch is purged) is left to whoever uses it."""
    for number in count(1):
        copy = os.path.join(to, tree.digest + f"-{number}" * (number > 1))
        if not os.path.lexists(copy):
            break
        if _whole(tree, copy):
            return copy
    part = os.path.join(to, f".{os.path.basename(copy)}.{socket.gethostname()}.{os.getpid()}")
    try:
        _fill(tree, part)
        if _look(tree.root, to).digest != tree.digest:
            raise _ChangedError
        os.rename(part, copy)
    except OSError:
        if not _whole(tree, copy):  # else another has been quicker
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return copy


def _whole(tree: _Tree, copy: str) -> bool:
    there = {name: about.st_size for name, about in _existing(copy, [ABOUT, DIFF, *tree.sizes])}
    return {ABOUT, DIFF} <= there.keys() and all(there.get(name) == size for name, size in tree.sizes.items())


def _fill(tree: _Tree, folder: str) -> None:
    for name in sorted({os.path.dirname(name) for name in tree.sizes} | {""}):
        os.makedirs(os.path.join(folder, name), exist_ok=True)

    def copy(name: str) -> None:
        source, target = os.path.join(tree.root, name), os.path.join(folder, name)
        shutil.copyfile(source, target, follow_symlinks=False)
        if stat.S_ISREG(tree.modes[name]) and tree.modes[name] & stat.S_IXUSR:
            mode = os.lstat(target).st_mode
            os.chmod(target, mode | (mode & 0o444) >> 2)  # whoever may read it may run it

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, tree.sizes))
    about = {
        "commit": tree.commit,
        "diff_sha256": hashlib.sha256(tree.diff).hexdigest(),
        "digest": tree.digest,
        "files": len(tree.sizes),
        "bytes": sum(tree.sizes.values()),
        "untracked": tree.untracked,
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "root": tree.root,
    }
    with open(os.path.join(folder, DIFF), "wb") as file:
        file.write(tree.diff)
    with open(os.path.join(folder, ABOUT), "wb") as file:
        file.write(json.dumps(about, indent=1).encode())


def _warnings(tree: _Tree) -> Iterator[str]:
    if tree.untracked:
        yield f"not in the snapshot, as git does not track it: {_some(tree.untracked)}; git add what the job needs"
    if tree.hollow:
        yield f"not in the snapshot, as it is not checked out: {_some(tree.hollow)}; git submodule update --init"
    if out := [name for name, mode in tree.modes.items() if stat.S_ISLNK(mode) and _leads_out(tree.root, name)]:
        yield f"symlinks out of the repository, of which relative ones will not work in the snapshot: {_some(out)}"


def _leads_out(root: str, name: str) -> bool:
    target = os.path.join(root, os.path.dirname(name), os.readlink(os.path.join(root, name)))
    return not os.path.normpath(target).startswith(root + "/")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(_shown(name) for name in names[:5]) + more


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _git(folder: str, *words: str) -> bytes:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_TIMEOUT_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise _NoRepositoryError("there is no git on this machine") from None
    except subprocess.TimeoutExpired:
        raise _NoRepositoryError(f"git {words[0]} takes more than {GIT_TIMEOUT_S} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise _NoRepositoryError(f"git {words[0]} says: {said or f'exit status {done.returncode}'}")
    return done.stdout
