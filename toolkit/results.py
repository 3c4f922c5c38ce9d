"""`toolkit.Run`: what a run has come to, for programs of one's own."""

import os
from typing import TYPE_CHECKING

from toolkit import run, storage
from toolkit.config import Job, job_from_text
from toolkit.errors import JobError

if TYPE_CHECKING:  # torch takes seconds to import, and whoever only waits for a run does without
    from torch import nn

    from toolkit.checkpoint import Archive


class Run(run.Run):
    """A run, found from its URL alone: `toolkit.Run("runs/x")`. Nothing here changes it, so it may be running.

    `status()` is status.json as a dict (state, step, epoch, heartbeat, reason, …), None before the first start.
    `metrics.read()` is a list of dicts, one a report, by step; each step comes once.
    `checkpoints` finds, verifies and loads them; `load_model()` gives the model of one.
    """

    def __repr__(self) -> str:
        return f"Run({storage.shown(self.url)!r})"

    def job(self) -> Job:
        """The job that it was made for. Raises JobError if there is no run here."""
        url, where = self.at("config.yaml"), storage.shown(self.url)
        try:
            text = storage.read(url).decode()
        except (FileNotFoundError, NotADirectoryError):
            raise JobError(
                f"{where} is no run: it has no config.yaml; give the directory of a run, such as runs/digits_mlp"
            ) from None
        except OSError as error:
            raise JobError(f"{where} cannot be read: {error}") from None
        except UnicodeDecodeError as error:
            raise JobError(f"{storage.shown(url)} is damaged: {error}; start the run again from its job file") from None
        return job_from_text(text, storage.shown(url), (), os.environ)

    @property
    def checkpoints(self) -> "Archive":
        """Those that are whole: `steps()`, oldest first, `newest()`, `best()`, `scores()`; `verify(step)` reads every
        byte of one.
        """
        from toolkit import persistence

        return persistence.archive_of(self.url, self.job())

    def load_model(self, which: str | int = "last", device: str = "cpu", averaged: bool = True) -> "nn.Module":
        """The job's model with the weights of a checkpoint, `last`, `best` or a step, in evaluation mode.

        Where weights were averaged (EMA) these are taken, for it is they that were evaluated; `averaged=False` takes
        those that were trained. The training set is looked at, for the shapes that the job does not name; what the
        caller draws at random stays the same. Raises JobError if there is no such checkpoint, DamagedError, a RunError,
        if one of its bytes is not what was saved.
        """
        import torch

        from toolkit import datasets, persistence, session
        from toolkit.checkpoint import export
        from toolkit.distributed import ALONE
        from toolkit.randomness import undisturbed

        job, archive = self.job(), self.checkpoints
        step = persistence.step_of(archive, str(which))
        off = dict.fromkeys(("compile", "activation_checkpointing", "channels_last"), False)
        plain = job.model_copy(update={"train": job.train.model_copy(update=off)})
        with undisturbed():
            shapes = datasets.shapes(datasets.build("data.train", job.data.train))
            model = session.model_of(plain, ALONE, torch.device(device), shapes)
        export.load(archive, step, model, averaged)
        return model.eval()
