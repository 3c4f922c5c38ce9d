"""S3 and what speaks like it."""

import asyncio
import base64
import posixpath
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from toolkit.storage.budget import TRY_S, Budget
from toolkit.storage.failures import error_code, shown
from toolkit.storage.local import TEMPORARY
from toolkit.storage.remote import Store, advisory

ONE_PUT_BYTES = 5 << 30  # S3's own limit; anything longer comes in parts
PIECE_BYTES = 1 << 18  # the least that must move within a try's time
KEYS_AT_ONCE = 1000
COPIES_AT_ONCE = 16

_exclusive = dict[tuple[str, str], bool]()  # by server and bucket


class S3(Store):
    """Whole objects by one request each; nothing is listed from memory."""

    def __init__(self, filesystem: Any, protocol: str, budget: Budget) -> None:
        super().__init__(filesystem, protocol, budget)
        filesystem.retries = 1  # more would multiply with ours

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        config = {
            "connect_timeout": 10,
            "read_timeout": TRY_S,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
            "request_checksum_calculation": "when_required",  # what is written is given one here
            "response_checksum_validation": "when_required",  # what is read is checked by who reads it
        }
        return {"use_listings_cache": False, "config_kwargs": config | given.get("config_kwargs", {})}

    def entries(self, path: str) -> list[dict[str, Any]]:
        try:
            found = self.wait(self.filesystem._lsdir(path))  # `ls` of what is not there lists all around it, too
        except FileNotFoundError:  # no such bucket
            return []
        return [entry for entry in found if entry["name"].strip("/") != path.strip("/")]

    def read(self, path: str, start: int, end: int | None) -> bytes:
        if end is not None and end <= start:
            self.size(path)
            return b""
        pieces = list[bytes]()
        self.wait(self._get(path, start, end, pieces.append))
        return b"".join(pieces)

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        came = 0

        def take(piece: bytes) -> None:
            nonlocal came
            buffer[came : came + len(piece)] = piece
            came += len(piece)

        if len(buffer):
            self.wait(self._get(path, start, start + len(buffer), take))
        return came

    async def _get(self, path: str, start: int, end: int | None, take: Any) -> None:
        bucket, key, _ = self.filesystem.split_path(path)
        stretch = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        try:
            answer = await self.filesystem._call_s3("get_object", Bucket=bucket, Key=key, **stretch)
        except OSError as error:
            if error_code(error) in {"InvalidRange", "416"} and (await self.filesystem._info(path))["size"] <= start:
                return  # the object ends before that
            raise
        moved = 0
        async with answer["Body"] as body:
            while piece := await body.read(PIECE_BYTES):
                take(piece)
                moved += len(piece)
                if moved >= PIECE_BYTES:
                    self.moved()
                    moved = 0

    def write(self, path: str, content: memoryview, durable: bool) -> None:
        del durable
        self._put(path, content)

    def create(self, path: str, content: memoryview) -> bool:
        try:
            self._put(path, content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error_code(error) in {"PreconditionFailed", "412"}:
                return False
            if error_code(error) not in {"NotImplemented", "501"}:
                raise
            self._put(path, content)
        return True

    def _put(self, path: str, content: memoryview, **options: Any) -> None:
        """With a checksum, or SeaweedFS takes a PUT that breaks off before its body for an empty object."""
        if len(content) < ONE_PUT_BYTES:
            checksum = base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()
            options |= {"chunksize": len(content) + 1, "ChecksumCRC32": checksum}
        self.call("pipe_file", path, _Body(content, self.moved), **options)

    def exclusive_note(self, path: str) -> str:
        """Tried out where the server is not AWS itself: some that speak like S3 take no notice of If-None-Match."""
        endpoint = self.wait(self.filesystem.set_session()).meta.endpoint_url
        place = (endpoint, self.filesystem.split_path(path)[0])
        if "amazonaws.com" in endpoint:
            return ""
        if place not in _exclusive:
            probe = posixpath.join(path, TEMPORARY + self.budget.token)
            try:
                made = self.create(probe, memoryview(b"1")) and self.create(probe, memoryview(b"2"))
            finally:
                self.remove(probe)
            _exclusive[place] = not made
        return "" if _exclusive[place] else advisory(f"the S3 server {shown(endpoint)}")

    def move(self, path: str, new_path: str) -> None:
        bucket, key, _ = self.filesystem.split_path(path)
        keys = self._keys(bucket, key.rstrip("/") + "/") or [key]  # a missing object is found when it is copied
        self.wait(self._copy([(f"{bucket}/{one}", new_path + one.removeprefix(key)) for one in keys]))
        self.remove(path)

    async def _copy(self, pairs: list[tuple[str, str]]) -> None:
        for start in range(0, len(pairs), COPIES_AT_ONCE):
            some = pairs[start : start + COPIES_AT_ONCE]
            await asyncio.gather(*(self.filesystem._cp_file(old, new) for old, new in some))
            self.moved()

    def remove(self, path: str) -> None:
        bucket, key, _ = self.filesystem.split_path(path)
        found = {key, *self._keys(bucket, key.rstrip("/") + "/")} if key else set(self._keys(bucket, ""))
        for one in list(found):  # a server that keeps real folders would go on listing them
            found |= {one[: end + 1] for end in range(len(key), len(one)) if one[end] == "/"}
        keys = sorted(found, reverse=True)  # what is inside comes first
        for start in range(0, len(keys), KEYS_AT_ONCE):
            objects = [{"Key": one} for one in keys[start : start + KEYS_AT_ONCE]]
            answer = self._request("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            for failed in answer.get("Errors", []):
                raise OSError(f"{failed.get('Key')}: {failed.get('Code')}: {failed.get('Message')}")

    def _keys(self, bucket: str, prefix: str) -> list[str]:
        found, more = list[str](), dict[str, Any]()
        while True:
            page = self._request("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            found += [entry["Key"] for entry in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def abort_uploads(self, path: str) -> int:
        bucket, key, _ = self.filesystem.split_path(path)
        count, more = 0, dict[str, Any]()
        while True:
            page = self._request("list_multipart_uploads", Bucket=bucket, Prefix=key, **more)
            for upload in page.get("Uploads", []):
                if not key or upload["Key"] == key or upload["Key"].startswith(key.rstrip("/") + "/"):
                    self._abort(bucket, upload["Key"], upload["UploadId"])
                    count += 1
            if not page.get("IsTruncated"):
                return count
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, bucket: str, key: str, upload: str) -> None:
        try:
            self._request("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        except FileNotFoundError:
            return  # it has ended by itself

    def _request(self, method: str, **words: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.wait(self.filesystem._call_s3(method, **words))
        return answer


class _Body:
    """Content as aiohttp and botocore can send it without a copy: 1 GiB of `bytes` costs them two, about 2 s of CPU."""

    def __init__(self, content: memoryview, moved: Callable[[], None]) -> None:
        self._content, self._moved, self._position = content, moved, 0

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> "_Body":
        return _Body(self._content[part], self._moved)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for start in range(0, len(self._content), PIECE_BYTES):
            yield self._content[start : start + PIECE_BYTES]
            self._moved()

    def read(self, length: int = -1) -> memoryview:
        """For the signature."""
        end = len(self) if length < 0 else self._position + length
        piece = self._content[self._position : end]
        self._position += len(piece)
        return piece

    def seek(self, position: int, whence: int = 0) -> None:
        self._position = position + (0, self._position, len(self))[whence]

    def tell(self) -> int:
        return self._position
