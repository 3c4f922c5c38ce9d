"""From a URL to its store, as often as it takes."""

import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from toolkit.errors import JobError
from toolkit.storage import failures
from toolkit.storage.budget import Budget
from toolkit.storage.failures import shown
from toolkit.storage.local import Local
from toolkit.storage.remote import Store
from toolkit.storage.s3 import S3
from toolkit.storage.sftp import Sftp

KINDS: dict[str, type[Store]] = {"s3": S3, "s3a": S3, "sftp": Sftp, "ssh": Sftp}
PAUSE_S, LONGEST_PAUSE_S, WORTH_A_TRY_S = 0.1, 3.0, 0.2

AnyStore = Local | Store
T = TypeVar("T")


def connected(url: str, budget: Budget | None = None) -> tuple[AnyStore, str]:
    """The store of a URL and the path in it.

    Asked for at each use: fsspec keeps one file system per process and set of options, and a forked child has none.
    """
    if "://" not in url and "::" not in url:  # what fsspec would make of it, in a twentieth of the time
        return Local(budget or Budget()), os.path.abspath(os.path.expanduser(url))
    protocol = fsspec.utils.get_protocol(url)
    kind = KINDS.get(protocol, Store)
    try:
        options = kind.options(fsspec.config.conf.get(protocol, {}))
        place, within = kind.split(url)
        filesystem, path = fsspec.core.url_to_fs(place, **options)
    except ImportError as error:
        raise JobError(f"{shown(url)} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise JobError(f"{shown(url)} is not a URL that can be used: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return Local(budget or Budget()), path
    return kind(filesystem, protocol, budget or Budget()), within or path


def persistently(verb: str, url: str, action: Callable[[AnyStore, str], T]) -> T:
    """Do it until it is done, time is over, or the error is one that stays; that one is told in words."""
    budget, store = Budget(), None
    cause: Exception | None = None
    while not budget.tries or budget.left_s > WORTH_A_TRY_S:
        budget.tries += 1
        try:
            store, path = connected(url, budget)
            return action(store, path)
        except Exception as error:
            local = isinstance(store, Local)
            if not failures.passes(error, local):
                failures.tell(error, verb, url, local)
            if not cause or not isinstance(error, TimeoutError):  # the last try, cut short, hides no better reason
                cause = error
            if store:
                store.renew()
        pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** min(budget.tries - 1, 9)) * random.uniform(0.5, 1.0)
        time.sleep(max(0.0, min(pause_s, budget.left_s / 2)))
    over_s = time.monotonic() - budget.began_s
    raise failures.given_up(cause, verb, url, f"tried {budget.tries} times over {over_s:.0f} s")
