"""What `toolkit status` shows: a run in a few lines, many in a table, both as JSON for machines."""

import json
import time
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit import storage
from toolkit.cluster.monitor import View, views

_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
_COLOURS = {"running": "green", "completed": "blue", "failed": "red", "lost": "red", "damaged": "red"}


def show(where: str, as_json: bool, console: Console) -> None:
    """The state of a run, or of all runs directly under `where`, the best first. Raises JobError if there is none."""
    found, many = views(where)
    if as_json:
        trees = [tree(view) for view in found]
        print(json.dumps(trees if many else trees[0], indent=1))
    elif many:
        console.print(_table(found))
        waiting = [f"{_name(view)}: {view.why.partition(chr(10))[0]}" for view in found if view.why]
        console.print("\n".join(waiting), **_PLAIN, end="\n" * bool(waiting))
    else:
        console.print("\n".join(lines(found[0])), **_PLAIN)


def tree(view: View) -> dict[str, Any]:
    """All that is known of a run, as plain values; None where something is not known."""
    known, status = view.known, view.known.status
    best, entry = known.best or {}, view.entry
    return {
        "run": storage.shown(known.url),
        "state": view.state,
        "why": view.why or None,
        "step": status.get("step"),
        "total": status.get("total"),
        "epoch": status.get("epoch"),
        "phase": status.get("phase"),
        "samples_per_s": known.rate,
        "metric": best.get("metric"),
        "best": best.get("score"),
        "heartbeat_age_s": known.heartbeat_s and round(max(0.0, time.time() - known.heartbeat_s), 1),
        "attempt": status.get("attempt"),
        "hosts": list(dict.fromkeys(status.get("hosts") or ([status["host"]] if status.get("host") else []))),
        "job_id": known.job_id,
        "checkpoint_step": (status.get("checkpoint") or {}).get("step"),
        "problem": status.get("problem"),
        "exit": status.get("exit"),
        "starts_at_s": entry.starts_at_s if entry else None,
        "log": known.submitted.get("log"),
        "postmortem": storage.shown(storage.join(known.url, "postmortem.md")) if known.postmortem else None,
    }


def lines(view: View) -> list[str]:
    """One run in a few lines."""
    facts = tree(view)
    where = ", ".join(f"{what} {facts[key]}" for what, key in (("attempt", "attempt"), ("job", "job_id")) if facts[key])
    hosts = f" on {', '.join(facts['hosts'])}" if facts["hosts"] else ""
    age_s = facts["heartbeat_age_s"]
    found = [f"{facts['run']}: {view.state}{_progress(facts)}", *[f"  {line}" for line in view.why.splitlines()]]
    if view.goes_on and age_s is not None:
        found.append(f"  heartbeat {age_s:.0f} s ago{_phase(facts)}")
    if where:
        found.append(f"  {where}{hosts}")
    if facts["checkpoint_step"] is not None:
        found.append(f"  newest checkpoint: step {facts['checkpoint_step']}")
    if facts["best"] is not None:
        found.append(f"  best {facts['metric']}: {facts['best']:.6g}")
    if facts["problem"]:
        found.append(f"  PROBLEM: {facts['problem']}")
    if facts["postmortem"] and view.state in ("failed", "restarting", "lost"):
        found.append(f"  see {facts['postmortem']}")
    return found


def _progress(facts: dict[str, Any]) -> str:
    if facts["step"] is None:
        return ""
    rate = f", {facts['samples_per_s']:g} samples/s" if facts["samples_per_s"] and facts["state"] == "running" else ""
    return f" at step {facts['step']} of {facts['total']}, epoch {facts['epoch']}{rate}"


def _phase(facts: dict[str, Any]) -> str:
    return f", in phase {facts['phase']}" if facts["phase"] else ""


def _table(found: list[View]) -> Table:
    metric = next((view.known.best["metric"] for view in found if view.known.best), "")
    table = Table(box=SIMPLE)
    for column in ("run", "state", *([f"best {metric}"] if metric else []), "step", "heartbeat", "job"):
        table.add_column(column, overflow="fold")
    for view in found:
        facts = tree(view)
        done = "" if facts["step"] is None else f"{facts['step']}/{facts['total']}"
        beat = f"{facts['heartbeat_age_s']:.0f} s ago" if view.goes_on and facts["heartbeat_age_s"] is not None else ""
        best = [] if not metric else ["" if facts["best"] is None else f"{facts['best']:.6g}"]
        state = Text(view.state, _COLOURS.get(view.state, ""))
        table.add_row(Text(_name(view)), state, *best, done, beat, facts["job_id"] or "")
    return table


def _name(view: View) -> str:
    return storage.shown(view.known.url).rstrip("/").rpartition("/")[2]
