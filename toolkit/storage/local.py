"""Files of this machine: POSIX, written whole or not at all, and on disk when we say so."""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator

from toolkit.storage.budget import Budget

TEMPORARY = ".tmp-"
EARLY_BYTES = 1 << 20
SYNC_FILE_RANGE_WRITE = 2
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NOT_THERE = {errno.ENOENT, errno.ELOOP}  # gone since it was listed, or a link that leads to itself
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class Local:
    """What `remote.Store` does, by paths."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def renew(self) -> None:
        """Nothing is kept between two uses."""

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def names(self, path: str) -> list[str]:
        try:
            return os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        if os.path.isdir(path):
            raise IsADirectoryError(path)
        return os.stat(path).st_size

    def sizes(self, path: str) -> dict[str, int]:
        found = dict[str, int]()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
                except OSError as error:
                    if error.errno not in NOT_THERE:
                        raise
        return found

    def read(self, path: str, start: int, end: int | None) -> bytes:
        with open(path, "rb") as file:
            if start:
                file.seek(start)
            return file.read() if end is None else file.read(max(0, end - start))

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        came = 0
        with open(path, "rb", buffering=0) as file:
            while came < len(buffer):
                count = os.preadv(file.fileno(), [buffer[came:]], start + came)
                if not count:
                    break
                came += count
        return came

    def write(self, path: str, content: memoryview, durable: bool) -> None:
        folder = os.path.dirname(path)
        _make_folders(folder)
        with _temporary(folder) as temporary:
            _fill(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), content, durable)
            os.replace(temporary, path)
        if durable:
            sync_folder(folder)

    def sync(self, folder: str, names: Iterable[str]) -> None:
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(folder)

    def create(self, path: str, content: memoryview) -> bool:
        """A link is made or not, and what it leads to is whole; `open(O_EXCL)` shows an empty file first."""
        folder = os.path.dirname(path)
        _make_folders(folder)
        with _temporary(folder) as temporary:
            _fill(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), content, durable=True)
            try:
                os.link(temporary, path)
            except FileExistsError:
                if os.stat(temporary).st_nlink != 2:  # if 2, the link is ours: NFS asks again when an answer is lost
                    return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                if not _create_without_link(path, content):
                    return False
        sync_folder(folder)
        return True

    def exclusive_note(self, path: str) -> str:
        del path
        return ""

    def move(self, path: str, new_path: str) -> None:
        _make_folders(os.path.dirname(new_path))
        os.rename(path, new_path)
        for folder in {os.path.dirname(path), os.path.dirname(new_path)}:
            sync_folder(folder)

    def remove(self, path: str) -> None:
        while os.path.lexists(path):
            with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)

    def free_bytes(self, path: str) -> int:
        while not os.path.exists(path):
            path = os.path.dirname(path)
        disk = os.statvfs(path)
        return 0 if disk.f_files and not disk.f_favail else disk.f_bavail * disk.f_frsize

    def abort_uploads(self, path: str) -> int:
        del path
        return 0


def sync_folder(folder: str) -> None:
    """Make the names in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:  # some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)


def _make_folders(folder: str) -> None:
    """Make a folder and those above it. A name is on disk only when the folder that holds it is."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for name in reversed(missing):
        try:
            os.mkdir(name)
        except FileExistsError:
            if not os.path.isdir(name):
                raise
        sync_folder(os.path.dirname(name))


def _create_without_link(path: str, content: memoryview) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        _fill(descriptor, content, durable=True)
    except BaseException:
        os.unlink(path)
        raise
    return True


def _fill(descriptor: int, content: memoryview, durable: bool) -> None:
    """Write all, however little a write takes, and close."""
    try:
        done = 0
        while done < len(content):
            done += os.write(descriptor, content[done:])
        if durable:
            os.fsync(descriptor)
        elif len(content) >= EARLY_BYTES:
            _begin_writeback(descriptor)
    finally:
        os.close(descriptor)


def _begin_writeback(descriptor: int) -> None:
    """Have the disk begin now, not only when `sync` is called. Waits for nothing, and promises nothing."""
    if sys.platform == "linux":
        start = length = ctypes.c_int64(0)  # all of the file
        ctypes.CDLL(None).sync_file_range(descriptor, start, length, SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def _temporary(folder: str) -> Iterator[str]:
    """A new name in the folder, removed if it is still there at the end."""
    path = os.path.join(folder, TEMPORARY + uuid.uuid4().hex)
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
