"""Files of another machine, by SSH. A put there is not atomic; a rename is."""

import contextlib
import errno
import posixpath
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from toolkit.storage.local import TEMPORARY
from toolkit.storage.remote import Store

PIECE_BYTES = 1 << 20


class Sftp(Store):
    """Written beside its name, then renamed over it, in one go; `sshfs` would truncate the old file first."""

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """sshfs reads no settings by itself, and trusts every host."""
        limits = {"connect_timeout": 10, "login_timeout": 15, "keepalive_interval": 15, "timeout": 15}
        return {**limits, "known_hosts": (), **given}

    @classmethod
    def split(cls, url: str) -> tuple[str, str | None]:
        """fsspec would cut a path off at ? and #."""
        scheme, _, rest = url.partition("://")
        host, _, path = rest.partition("/")
        return f"{scheme}://{host}/", "/" + path.strip("/")

    _answered = False  # the server itself has said that it failed

    def renew(self) -> None:
        """A connection that is lost stays so: the next try makes another."""
        if not self._answered:
            self.filesystem.clear_instance_cache()

    def read(self, path: str, start: int, end: int | None) -> bytes:
        pieces = list[bytes]()
        self.wait(self._get(path, start, end, pieces.append))
        return b"".join(pieces)

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        came = 0

        def take(piece: bytes) -> None:
            nonlocal came
            buffer[came : came + len(piece)] = piece
            came += len(piece)

        self.wait(self._get(path, start, start + len(buffer), take))
        return came

    async def _get(self, path: str, start: int, end: int | None, take: Any) -> None:
        async with self._channel() as channel, channel.open(path, "rb") as file:
            while end is None or start < end:
                piece = await file.read(PIECE_BYTES if end is None else min(PIECE_BYTES, end - start), start)
                if not piece:
                    break
                take(piece)
                start += len(piece)
                self.moved()

    def write(self, path: str, content: memoryview, durable: bool) -> None:
        self.wait(self._put(path, content, durable))

    async def _put(self, path: str, content: memoryview, durable: bool) -> None:
        async with self._channel() as channel, self._filled(channel, path, content, durable) as temporary:
            await channel.posix_rename(temporary, path)

    def sync(self, folder: str, names: Iterable[str]) -> None:
        self.wait(self._sync([posixpath.join(folder, name) for name in names]))

    async def _sync(self, paths: list[str]) -> None:
        from asyncssh.sftp import SFTPOpUnsupported

        async with self._channel() as channel:
            for path in paths:
                async with channel.open(path, "rb") as file:
                    with contextlib.suppress(SFTPOpUnsupported):
                        await file.fsync()
                self.moved()

    def create(self, path: str, content: memoryview) -> bool:
        return bool(self.wait(self._create(path, content)))

    async def _create(self, path: str, content: memoryview) -> bool:
        from asyncssh.sftp import SFTPError, SFTPOpUnsupported

        async with self._channel() as channel, self._filled(channel, path, content, durable=True) as temporary:
            try:
                await channel.link(temporary, path)
            except SFTPOpUnsupported:
                async with channel.open(path, "xb") as file:
                    await file.write(bytes(content))
            except SFTPError:  # OpenSSH says no more than "Failure"
                if await channel.exists(path):
                    return False
                raise
        return True

    def exclusive_note(self, path: str) -> str:
        del path
        return ""

    def move(self, path: str, new_path: str) -> None:
        self.wait(self._move(path, new_path))

    async def _move(self, path: str, new_path: str) -> None:
        async with self._channel() as channel:
            await channel.makedirs(posixpath.dirname(new_path), exist_ok=True)
            await channel.posix_rename(path, new_path)

    def remove(self, path: str) -> None:
        self.wait(self._remove(path))

    async def _remove(self, path: str) -> None:
        async with self._channel() as channel:
            while await channel.lexists(path):
                with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                    if await channel.isdir(path) and not await channel.islink(path):
                        await channel.rmtree(path)
                    else:
                        await channel.unlink(path)

    @contextlib.asynccontextmanager
    async def _filled(self, channel: Any, path: str, content: memoryview, durable: bool) -> AsyncIterator[str]:
        """A new file beside the path that holds the content; removed if it is still there at the end."""
        from asyncssh.sftp import SFTPError, SFTPNoSuchFile, SFTPOpUnsupported

        folder = posixpath.dirname(path)
        temporary = posixpath.join(folder, TEMPORARY + self.budget.token)
        try:
            try:
                file = await channel.open(temporary, "wb")
            except SFTPNoSuchFile:
                await channel.makedirs(folder, exist_ok=True)
                file = await channel.open(temporary, "wb")
            async with file:
                for start in range(0, len(content), PIECE_BYTES):
                    await file.write(bytes(content[start : start + PIECE_BYTES]))
                    self.moved()
                if durable:
                    with contextlib.suppress(SFTPOpUnsupported):
                        await file.fsync()
            yield temporary
        finally:
            with contextlib.suppress(SFTPError):
                await channel.unlink(temporary)

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        """A channel whose errors are those that Python has."""
        from asyncssh.sftp import SFTPConnectionLost, SFTPError, SFTPNoSuchFile, SFTPNoSuchPath, SFTPPermissionDenied

        try:
            async with self.filesystem._pool.get() as channel:
                yield channel
        except (SFTPNoSuchFile, SFTPNoSuchPath) as error:
            raise FileNotFoundError(errno.ENOENT, str(error)) from error
        except SFTPPermissionDenied as error:
            raise PermissionError(errno.EACCES, str(error)) from error
        except SFTPError as error:
            self._answered = not isinstance(error, SFTPConnectionLost)
            raise OSError(f"{type(error).__name__}: {error}") from error
        except ValueError as error:  # so the pool says that it gets no channel
            raise ConnectionError(str(error)) from error
