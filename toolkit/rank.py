"""A rank's side of being watched: it leaves notes in its node's folder, and nowhere else.

rank-1.json       its pid; at the end its exit status and message
rank-1.pulse      its heartbeat
rank-1.log        what it says
rank-1-stacks.log where its threads are, when somebody asks
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit import pulse
from toolkit.process import die_with_parent
from toolkit.signals import hold_back

ATTEMPT_DIR = "TOOLKIT_ATTEMPT_DIR"
LOCK = "node.lock"  # held, and filled with its pid, by whoever has started the ranks
SHOW_STACKS = signal.SIGQUIT  # to a rank: write down where each of your threads is


def enter(environment: Mapping[str, str]) -> None:
    """Leave a note, die with torchrun, let rank 0 alone have the console, be ready to show its stacks."""
    rank, folder = int(environment["RANK"]), Path(environment[ATTEMPT_DIR])
    die_with_parent()
    if os.getppid() in (1, int((folder / LOCK).read_text())):
        sys.exit(1)  # torchrun has died before that was asked for
    hold_back()
    sys.stdout.flush()
    if rank == 0:
        os.dup2(1, 2)
    else:
        log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    faulthandler.enable()  # a crash in native code says where
    stacks = open(folder / f"rank-{rank}-stacks.log", "ab", buffering=0)  # noqa: SIM115 - open for as long as the rank is
    faulthandler.register(SHOW_STACKS, stacks, all_threads=True)
    pulse.keep_in(str(folder / f"rank-{rank}.pulse"))
    _write_note(environment, {"pid": os.getpid()})


def leave(environment: Mapping[str, str], status: int, message: str, blamed: int | None = None) -> int:
    """Note how this rank ended, and which one it blames for that. Returns the status for torchrun, to which a rank that
    stopped early is a success.
    """
    ending = {"exit": status, "message": message, "time_s": time.time(), "blamed": blamed}
    _write_note(environment, {"pid": os.getpid()} | ending)
    return 0 if status == 75 else status


def _write_note(environment: Mapping[str, str], note: Mapping[str, Any]) -> None:
    path = Path(environment[ATTEMPT_DIR]) / f"rank-{environment['RANK']}.json"
    path.with_suffix(".new").write_text(json.dumps(note))
    path.with_suffix(".new").replace(path)
