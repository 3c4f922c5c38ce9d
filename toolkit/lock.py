"""One writer at a time, with fencing.

Each start of a run claims the next number by creating lock/attempt-N.json, which only one can. Who has the highest
number holds the lock. The holder renews a heartbeat in its claim and looks whether there is a higher one: then it has
lost, and commits nothing any more, however long it had been suspended. The number stands in every manifest, and of two
manifests for one step that of the higher attempt stays.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil

from toolkit import storage
from toolkit.errors import JobError, RunError

BEAT_S, REMOTE_BEAT_S = 5.0, 15.0
BEATS_MISSED = 3  # then a holder is dead: seen by watching its claim, for clocks of hosts differ
ANCIENT_S = 600.0  # but not by that much


class Lock:
    """The right to write to a run.

    `identity` is who this process is: host, pid, pid_namespace, boot_id, slurm_job_id, slurm_restart_count. `on_beat`
    is called with each heartbeat, in the lock's own thread. `problem` says why the last one could not be written.
    """

    def __init__(self, url: str, identity: Mapping[str, Any], on_beat: Callable[[], None] = lambda: None) -> None:
        self.url, self.identity, self.on_beat = url, dict(identity), on_beat
        self.beat_s = BEAT_S if storage.local_path(url) else REMOTE_BEAT_S
        self.attempt = 0
        self.lost: str | None = None
        self.problem: str | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self, at_least: int = 1, say: Callable[[str], None] = lambda words: None) -> int:
        """Become the writer and return the number of this attempt, `at_least` or more.

        Raises JobError that says who holds the lock, if that one is alive. Where that cannot be known, its heartbeat is
        watched for a while, and `say` says so.
        """
        while True:
            holder = self._highest()
            if holder and self._alive(holder, say):
                raise JobError(self._refusal(holder))
            self.attempt = max(at_least, holder["attempt"] + 1 if holder else 1)
            if storage.create(self._claim_url(self.attempt), self._content()):
                if self.attempt == max(self._numbers(), default=0):
                    break
                storage.remove(self._claim_url(self.attempt))  # others came, and tidied, while we looked at an old one
        for number in self._numbers():
            if number < self.attempt:
                storage.remove(self._claim_url(number))
        self._thread = threading.Thread(target=self._beat, name="toolkit-lock", daemon=True)
        self._thread.start()
        return self.attempt

    def was_taken(self) -> bool:
        """Whether another attempt has taken over. Asks the store, unless it is known."""
        if not self.lost:
            self._look()
        return self.lost is not None

    def check(self) -> None:
        """Raises RunError if another attempt has taken over. Asks the store: for what must not be done twice."""
        self.was_taken()
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises RunError if the last heartbeat found that another attempt has taken over. Costs nothing."""
        if self.lost:
            raise RunError(self.lost)

    def release(self) -> None:
        """Let the next attempt begin at once. Does nothing where none was claimed.

        A store that is away is no error: then the next attempt watches the claim for a while.
        """
        if not self._thread:
            return
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if not self.was_taken():
                storage.write(self._claim_url(self.attempt), self._content(released=True))

    def note(self) -> str:
        """What to know of this store, or nothing."""
        return storage.exclusive_note(self.url)

    def _beat(self) -> None:
        while not self._ended.wait(self.beat_s) and not self.lost:
            try:
                self._look()
                if not self.lost:
                    storage.write(self._claim_url(self.attempt), self._content(), durable=False)
            except OSError as error:
                self.problem = str(error)  # a store that is away for a while; commits ask it themselves
                continue
            self.problem = None
            if not self.lost:
                self.on_beat()

    def _look(self) -> None:
        newer = [number for number in self._numbers() if number > self.attempt]
        if newer:
            other: Mapping[str, Any] = {}
            with suppress(JobError):  # whatever it says: it is there
                other = self._read(max(newer)) or {}
            self.lost = (
                f"attempt {max(newer)} on host {other.get('host')} (pid {other.get('pid')}) has taken over "
                f"{storage.shown(self.url)}; this is attempt {self.attempt}, which writes nothing any more"
            )

    def _alive(self, holder: Mapping[str, Any], say: Callable[[str], None]) -> bool:
        """Whether the process of a claim still writes."""
        me = self.identity
        if holder["released"] or time.time() - holder["heartbeat"] > ANCIENT_S:
            return False
        same_job = holder["slurm_job_id"] and holder["slurm_job_id"] == me["slurm_job_id"]
        if same_job and holder["slurm_restart_count"] < me["slurm_restart_count"]:
            return False  # Slurm ends one start of a job before it begins the next
        same_host, same_boot = holder["host"] == me["host"], holder["boot_id"] == me["boot_id"]
        if same_boot and holder["pid_namespace"] == me["pid_namespace"] and (holder["boot_id"] or same_host):
            return _runs(holder["pid"], holder["claimed"])
        wait_s = BEATS_MISSED * self.beat_s
        if same_host and not same_boot and time.time() - holder["heartbeat"] > wait_s:
            return False  # this machine has been started again since; or another has its name, and stands still
        say(f"{self._words(holder)}; watching it for up to {wait_s:.0f} s")
        return self._beats_within(wait_s, holder)

    def _beats_within(self, wait_s: float, holder: Mapping[str, Any]) -> bool:
        """Whether its heart beats while this process watches; what passes while that stands still does not count."""
        watched_s, looked_s = 0.0, time.monotonic()
        while True:
            now = self._highest()
            if now and (now["attempt"], now["heartbeat"]) != (holder["attempt"], holder["heartbeat"]):
                return not now["released"]
            if watched_s >= wait_s:
                return False
            time.sleep(min(1.0, self.beat_s / 5))
            before_s, looked_s = looked_s, time.monotonic()
            watched_s += min(looked_s - before_s, self.beat_s)

    def _refusal(self, holder: Mapping[str, Any]) -> str:
        holder = self._highest() or holder
        return f"{self._words(holder)}; wait for it, end it, or use --fresh or another run.dir"

    def _words(self, holder: Mapping[str, Any]) -> str:
        run, age_s = storage.shown(self.url).removesuffix("/lock"), time.time() - holder["heartbeat"]
        job = f", Slurm job {holder['slurm_job_id']}" if holder["slurm_job_id"] else ""
        return (
            f"{run} is held by attempt {holder['attempt']} on host {holder['host']} (pid {holder['pid']}{job}), "
            f"heartbeat {max(0.0, age_s):.0f} s ago"
        )

    def _highest(self) -> dict[str, Any] | None:
        numbers = self._numbers()
        return self._read(max(numbers)) if numbers else None

    def _numbers(self) -> list[int]:
        found = [re.fullmatch(r"attempt-(\d{4,9})\.json", name) for name in storage.names(self.url)]
        return [int(match[1]) for match in found if match]

    def _read(self, number: int) -> dict[str, Any] | None:
        url = self._claim_url(number)
        try:
            claim: dict[str, Any] = json.loads(storage.read(url))
        except FileNotFoundError:  # a later attempt has tidied up
            return self._highest()
        except ValueError as error:
            raise JobError(f"{storage.shown(url)} is damaged ({error}); remove it if no one trains there") from error
        return claim

    def _claim_url(self, number: int) -> str:
        return storage.join(self.url, f"attempt-{number:04d}.json")

    _claimed: float | None = None

    def _content(self, released: bool = False) -> bytes:
        self._claimed = self._claimed or time.time()
        times = {"claimed": self._claimed, "heartbeat": time.time(), "released": released}
        return (json.dumps({"attempt": self.attempt, **self.identity, **times}, indent=1) + "\n").encode()


def newest_claim(url: str) -> dict[str, Any] | None:
    """What the holder of the lock has written of itself, whether it still runs or not; None if there was never one."""
    return Lock(url, {})._highest()


def holder_of(url: str, say: Callable[[str], None] = lambda words: None) -> dict[str, Any] | None:
    """The claim of the process that writes to a run, or None; for commands that claim nothing.

    Returns at its next heartbeat. One that was killed is found out by waiting for one, and `say` says so.
    """
    lock = Lock(url, dict.fromkeys(("host", "boot_id", "pid_namespace", "slurm_job_id")))
    claim = lock._highest()
    return claim if claim and lock._alive(claim, say) else None


def _runs(pid: int, since_s: float) -> bool:
    """Whether a process of this machine that ran at that time still does."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since_s + 1
    except psutil.NoSuchProcess:
        return False
