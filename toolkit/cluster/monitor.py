"""What state runs are in: from status.json first, then from what the scheduler says of their jobs."""

import calendar
import json
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil

from toolkit import storage
from toolkit.cluster.queue import Answer, Entry, look
from toolkit.config.text import parse
from toolkit.errors import JobError
from toolkit.lock import BEAT_S, BEATS_MISSED, REMOTE_BEAT_S, newest_claim
from toolkit.run import Run

IS_RUN = {"status.json", "submitted.json", "config.yaml"}
GOES_ON = {"queued", "requeued", "starting", "running", "restarting"}
_AT_ONCE = 16  # runs looked at, for each costs a store some answers
_SUBMITTED_LATELY_S = 5.0  # before the scheduler was asked, by another's clock

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """What a run's directory says; the best score in its metrics, of those its job ranks checkpoints by, and the rate
    only if they were asked for.
    """

    url: str
    status: Tree
    submitted: Tree
    heartbeat_s: float | None = None  # since the epoch; of the loop, or of the lock, whichever is later
    best: Tree | None = None  # {"metric": …, "mode": …, "score": …}
    rate: float | None = None  # samples per second, in the last line of metrics
    postmortem: bool = False

    @property
    def job_id(self) -> str | None:
        """The run's job, as Slurm's commands take it; None for a run of no scheduler."""
        if self.submitted:
            return self.submitted["job_id"] if self.submitted["executor"] == "slurm" else None
        return self.status.get("slurm_job_id")

    @property
    def submitted_s(self) -> float:
        """When it was last submitted, since the epoch; 0 if it never was."""
        return seconds(self.submitted["submitted_at"]) if self.submitted else 0.0

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good, and has not been submitted again since."""
        return self.status.get("state") in ("completed", "cancelled", "damaged") and (
            self.submitted_s <= (self.heartbeat_s or 0.0)
        )


@dataclass(frozen=True)
class View:
    """A run's state: new, queued, requeued, starting, running, restarting; or at rest: preempted, failed, completed,
    cancelled, lost; or damaged.
    """

    known: Known
    state: str
    why: str = ""
    entry: Entry | None = field(default=None, compare=False)

    @property
    def goes_on(self) -> bool:
        """Whether it will take another step with nobody doing anything."""
        return self.state in GOES_ON


def view(run: str) -> View:
    """The state of one run, without its metrics, which may be long. Raises JobError if there is none."""
    names = storage.names(run)
    if not IS_RUN.intersection(names):
        raise JobError(f"{storage.shown(run)} is no run; give the directory of one, such as runs/digits_mlp")
    return _views([_alone(run, names, scored=False)])[0]


def views(root: str) -> tuple[list[View], bool]:
    """(the runs, whether `root` is not one run itself): all runs directly under it, the best first.

    Raises JobError if there is none.
    """
    names = storage.names(root)
    if IS_RUN.intersection(names):
        return _views([_alone(root, names)]), False
    urls = [storage.join(root, name) for name in names if not name.startswith(".")]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [known for known in pool.map(_known_or_none, urls) if known]
    if not found:
        raise JobError(f"{storage.shown(root)} is no run, and none lies in it; give the directory of a run or of runs")
    return sorted(_views(found), key=_rank), True


def _rank(view: View) -> tuple[Any, ...]:
    best, name = view.known.best, storage.shown(view.known.url)
    if not best or best["score"] is None:
        return (1, 0.0, name)
    return (0, -best["score"] if best["mode"] == "max" else best["score"], name)


def _views(found: Sequence[Known]) -> list[View]:
    """The states of runs, for one question to the scheduler."""
    answer = look(known.job_id for known in found if known.job_id and not known.is_over)
    return [judged(known, *_scheduled(known, answer), time.time()) for known in found]


def _scheduled(known: Known, answer: Answer) -> tuple[Entry | None, str | None]:
    """(what is known of the run's job, why nothing can be known of it)."""
    if known.is_over:
        return None, None
    if not known.job_id:
        return _here(known.submitted) if known.submitted else (None, None)
    entry = answer.entries.get(known.job_id)
    unknown = answer.problem or (
        "Slurm has yet to be asked: look again in 10 s" if known.job_id in answer.unasked else None
    )
    if entry or not known.submitted:
        return entry, unknown
    if not answer.here:
        return None, "no Slurm here to ask"
    lately = known.submitted_s > answer.at_s - _SUBMITTED_LATELY_S
    return None, unknown or ("it was submitted just now" if lately else None)


def _here(submitted: Tree) -> tuple[Entry | None, str | None]:
    """The same of a run that was submitted to one machine."""
    if submitted["host"] != socket.gethostname():
        return None, f"it was submitted on {submitted['host']}"
    return (Entry("RUNNING") if local_process(submitted) else None), None


def local_process(submitted: Tree) -> psutil.Process | None:
    """The process of a run that was submitted to this machine, if it still runs."""
    try:
        process = psutil.Process(submitted["pid"])
        same = process.create_time() < seconds(submitted["submitted_at"]) + 60  # or the number has been given anew
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def judged(known: Known, entry: Entry | None, unknown: str | None, now_s: float) -> View:
    """The state of a run, by what its directory says, what the scheduler says of its job, or why that says nothing."""
    state, reason = known.status.get("state", "queued"), known.status.get("reason") or ""
    if known.is_over:
        return View(known, state, reason)
    if not known.status and not known.submitted:
        return View(known, "new", "it has never been started")
    if state == "running" and _fresh(known, now_s):
        return View(known, state, "", entry)
    silent = f"no heartbeat for {now_s - known.heartbeat_s:.0f} s" if known.heartbeat_s else "it has not begun"
    if entry and entry.active:
        return View(known, *_in_queue(known, entry, silent), entry)
    if state in ("failed", "preempted", "completed", "cancelled"):
        return View(known, state, reason, entry)
    return View(known, state, f"{silent}; {unknown}", entry) if unknown else _lost(known, entry, silent)


def _in_queue(known: Known, entry: Entry, silent: str) -> tuple[str, str]:
    """(state, why) of a run whose job waits or runs, and which takes no steps now."""
    state = known.status.get("state")
    if entry.waits:
        return "requeued" if known.status.get("attempt") and state != "queued" else "queued", entry.why()
    if state == "running":
        return "running", silent
    return ("restarting", known.status.get("reason") or "") if state == "failed" else ("starting", "")


def _lost(known: Known, entry: Entry | None, silent: str) -> View:
    """A run that says that it goes on, or soon will, and of which nothing is left."""
    if not known.submitted and known.status["state"] == "queued":
        return View(known, "queued", "it is being submitted, or that was broken off")
    job, log = f"job {known.job_id}", known.submitted.get("log")
    if entry and entry.state == "CANCELLED":
        return View(known, "cancelled", f"{job} was cancelled in Slurm", entry)
    words = f", and {job} {'ended as ' + entry.state if entry else 'is not in the queue'}" if known.job_id else ""
    see = f"; see {log}" if log and not known.status.get("attempt") else ""
    return View(known, "lost", f"{silent}{words}{see}", entry)


def _fresh(known: Known, now_s: float) -> bool:
    beat_s = BEAT_S if storage.local_path(known.url) else REMOTE_BEAT_S
    late_s = BEATS_MISSED * beat_s + 1  # it is written in whole seconds
    return known.heartbeat_s is not None and now_s - known.heartbeat_s <= late_s


def _known_or_none(url: str) -> Known | None:
    """As `_known`; None for what is no run. One that cannot be read hides no other."""
    try:
        names = storage.names(url)
        return _known(url, names) if IS_RUN.intersection(names) else None
    except (OSError, ValueError) as error:
        return Known(url, {"state": "damaged", "reason": str(error)}, {})


def _alone(url: str, names: Sequence[str], scored: bool = True) -> Known:
    """As `_known`. Raises JobError for one of whose files the text is damaged."""
    try:
        return _known(url, names, scored)
    except JobError:
        raise
    except ValueError as error:
        raise JobError(
            f"{storage.shown(url)} is damaged ({error}); remove it, or start a new run with --fresh"
        ) from error


def _known(url: str, names: Sequence[str], scored: bool = True) -> Known:
    """Read what a run's directory, with these names in it, says; its metrics only if it is to be `scored`."""
    status = Run(url).status() or {}
    submitted = json.loads(storage.read(storage.join(url, "submitted.json"))) if "submitted.json" in names else {}
    heartbeat_s = seconds(status["heartbeat"]) if "heartbeat" in status else None
    if status.get("state") == "running" and heartbeat_s and time.time() - heartbeat_s > BEAT_S:
        claim = newest_claim(storage.join(url, "lock"))  # renewed in a long step or evaluation, too
        if claim and not claim["released"] and claim["attempt"] == status.get("attempt"):
            heartbeat_s = max(heartbeat_s, claim["heartbeat"])
    best, rate = _scores(url, names) if scored else (None, None)
    return Known(url, status, submitted, heartbeat_s, best, rate, "postmortem.md" in names)


def _scores(url: str, names: Sequence[str]) -> tuple[Tree | None, float | None]:
    """(the best score, samples per second in the last lines) of a run's metrics."""
    lines = Run(url).metrics.read() if "metrics.jsonl" in names else []
    best = _best_rule(url) if "config.yaml" in names else None
    if best:
        scores = [line[best["metric"]] for line in lines if line.get(best["metric"]) is not None]
        best["score"] = (max if best["mode"] == "max" else min)(scores) if scores else None
    rates = [line["train/samples_per_s"] for line in lines[-20:] if "train/samples_per_s" in line]
    return best, rates[-1] if rates else None


def _best_rule(url: str) -> dict[str, Any] | None:
    """`checkpoint.best` of a run's job, which was checked when it was written."""
    value = parse(storage.read(storage.join(url, "config.yaml")).decode()).value
    best: dict[str, Any] | None = (value.get("checkpoint") or {}).get("best")
    return best


def seconds(text: str) -> float:
    """Since the epoch, of a time as a run's files have it."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))
