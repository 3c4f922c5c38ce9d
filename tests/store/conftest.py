"""Real stores, for the tests in this folder and whatever these start."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.store.servers import (
    FaultProxy,
    MissingError,
    S3Server,
    Server,
    SftpServer,
    forget_connections,
    is_open,
    used,
)


@contextmanager
def running(kind: type[Server], folders: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the whole session. Where it is missing the test is skipped, but not on the machine that must not."""
    folder = folders.mktemp(kind.__name__)
    missing = ""
    try:
        server = kind(folder)
    except MissingError as error:
        missing = str(error)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    if missing:
        pytest.skip(missing)
    try:
        with server:
            yield server
            forget_connections()
    finally:
        shutil.rmtree(folder)
    assert not is_open(server.port)


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(S3Server, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="session")
def sftp_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(SftpServer, tmp_path_factory) as server:
        yield server


@pytest.fixture
def s3_server(s3_process: S3Server) -> Iterator[S3Server]:
    """A server that is up, and this process's store of s3:// URLs; `environment` makes it that of others, too."""
    if not is_open(s3_process.port):  # a test has killed it
        s3_process.start()
    with used(s3_process.environment):
        yield s3_process


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """Stands before `s3_server`: s3:// URLs of this test go through it."""
    with FaultProxy(s3_server) as between, used(between.environment):
        yield between


@pytest.fixture
def sftp_server(sftp_process: SftpServer) -> Iterator[SftpServer]:
    if not is_open(sftp_process.port):
        sftp_process.start()
    with used(sftp_process.environment):
        yield sftp_process
