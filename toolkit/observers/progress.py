"""What a person sees: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Step, epoch, loss, samples/s and the time left; drawn every `REDRAW_S`, for drawing costs milliseconds."""

    REDRAW_S, LINE_S = 0.5, 10.0

    def __init__(self, console: Console) -> None:
        self.console, self.words = console, ""
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[words]}"),
            TextColumn("left"), TimeRemainingColumn(),
            console=console, auto_refresh=False, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("train", words="")
        self.next_s = 0.0

    def start(self, trainer: Any) -> None:
        self.bar.update(self.task, total=trainer.total_steps, completed=trainer.state.step)
        self.bar.start()

    def after_step(self, trainer: Any) -> None:
        now_s = time.monotonic()
        if now_s >= self.next_s and self.console.is_terminal:
            self.bar.update(self.task, completed=trainer.state.step, words=self.words, refresh=True)
            self.next_s = now_s + self.REDRAW_S

    def show(self, line: Mapping[str, Any]) -> None:
        """A line of metrics has come: evaluations and skipped steps are printed, losses go beside the bar or, now and
        then, on a line of their own.
        """
        self.words = (
            f"epoch {line['epoch']}  loss {line['train/loss']:.4f}  {line['train/samples_per_s']:.0f} samples/s"
        )
        found = "  ".join(f"{name} {value:.4f}" for name, value in line.items() if name.startswith(("val/", "test/")))
        for event in line.get("events", []):
            if event["event"] == "skip":  # a rollback has been said when it came
                self._print(f"WARNING: {event['why']}: skipped, positions {event['positions']} of the stream")
        now_s = time.monotonic()
        if found or (not self.console.is_terminal and now_s >= self.next_s):
            self._print(f"step {line['step']}  {self.words}  {found}".rstrip())
            self.next_s = now_s + (self.REDRAW_S if self.console.is_terminal else self.LINE_S)

    def end(self, trainer: Any) -> None:
        self.bar.stop()

    def _print(self, words: str) -> None:
        self.bar.console.print(words, highlight=False, markup=False, soft_wrap=True)
