"""How a start of a run ends, completed, stopped or failed: in status.json, in postmortem.md and on the console."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from toolkit import distributed, postmortem, storage
from toolkit.run import CANCEL, STOP, Run
from toolkit.signals import StopSignals
from toolkit.trainer import Trainer

PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "sep": "\n"}


@dataclass(frozen=True)
class Result:
    """How a start of a run ended: `completed`, or `preempted` or `cancelled` with everything saved."""

    state: str
    url: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


def ended(
    run: Run,
    name: str,
    trainer: Trainer,
    epoch_of: Callable[[int], int],
    evaluates: bool,
    signals: StopSignals,
    console: Console,
) -> Result:
    """Say how a start ended in which nothing failed, and part from the other ranks."""
    step = trainer.state.step
    state, exit_status, reason = "completed", 0, None
    broken_off = "stop" in trainer.agreed and evaluates  # the last evaluation is still to be made
    if broken_off or not trainer.finished:
        state = "cancelled" if run.wished(CANCEL) else "preempted"  # which rank 0 knows, and writes
        exit_status, reason = 75, _why_stopped(run, signals)
    metrics: dict[str, float] = {}
    if trainer.ranks.leads:
        run.metrics.close()  # raises if a line could not be written, and then this is no good end
        lines = [line for line in run.metrics.read() if line["step"] == step]
        reported = {key: value for line in lines for key, value in line.items() if value is not None}
        metrics = {key: value for key, value in reported.items() if key.startswith(("val/", "test/"))}
        found = "".join(f"  {key} {value:.4f}" for key, value in sorted(metrics.items()))
        summary = f"{name}: {state} at step {step} of {trainer.total_steps}{found}\n"
        summary += f"run directory: {storage.shown(run.url)}"
        progress: dict[str, Any] = {"step": step, "total": trainer.total_steps, "epoch": epoch_of(step)}
        asked = [wish for wish in (STOP, CANCEL) if run.wished(wish)]
        how: dict[str, Any] = {"reason": reason, "exit": exit_status, "asked": asked}
        run.set_status(state, **progress, **how, metrics=metrics, summary=summary)
        for wish in asked:
            run.granted(wish)
        console.print(summary, **PLAIN)
        if exit_status:
            console.print("Everything is saved; the same command goes on from here.", **PLAIN)
    distributed.leave()
    return Result(state, run.url, step, metrics)


def _why_stopped(run: Run, signals: StopSignals) -> str:
    if run.wished(CANCEL):
        return "a cancel request in the run"
    if signals.received:
        return f"stopped by {signals.received.name}"
    return "a stop request in the run" if run.wished(STOP) else "another rank was asked to stop"


def failed(run: Run, trainer: Trainer, attempt: int, cause: Exception) -> None:
    """Write down why this process fails. A supervisor, which sees all ranks, may overrule that later."""
    if not trainer.ranks.leads or run.lost:
        return
    with suppress(OSError):  # the cause is what matters, and it is shown whatever the store does
        run.set_status("failed", step=trainer.state.step, reason=str(cause), exit=1)
        blamed = getattr(cause, "rank", None)
        rank = trainer.ranks.rank if blamed is None else blamed
        page = postmortem.of_exception(cause, attempt, rank, run.newest_checkpoint())
        postmortem.write(run, page)


def silent(run: Run, before: Mapping[str, Any], machine: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Write the page on the attempt before, of whose status `before` is, if it has ended without a word."""
    if page := postmortem.of_silent_end(before, machine):
        postmortem.write(run, page)
        say(f"attempt {before['attempt']} ended without a word; see {storage.shown(run.at('postmortem.md'))}")
