"""Whether the kernel has killed a process for want of memory: a SIGKILL does not say where it comes from.

Two witnesses, where they can be heard: the kernel's log, which names the process, and the counter of the process's own
cgroup (v2 `memory.events`, v1 `memory.oom_control`; Linux, Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst).
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


class OomWatch:
    """Looks at the counters of processes' cgroups while they live, and again when one of them was killed."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}
        self._latest: dict[Path, int] = {}
        self._at_s = 0.0

    def look(self, pids: Iterable[int]) -> None:
        """To be called again and again. What was counted until a second ago has nothing to do with a death now."""
        if time.monotonic() - self._at_s > 1:
            now = {path: _number(path) for pid in pids for path in _counters(_cgroups_of(pid))}
            self._before, self._latest, self._at_s = self._latest or now, now, time.monotonic()

    def verdict(self, pid: int) -> str | None:
        """Words on how it is known that a process was killed for want of memory; None if nothing says so."""
        if line := said_by_kernel(pid):
            return f"the kernel's log says: {line}"
        for path, before in self._before.items():
            if _number(path) > before:
                return f"{path} has just counted a kill"
        return None


def said_by_kernel(pid: int) -> str | None:
    """The kernel's line on having killed this process for want of memory, if its log may be read."""
    found = None
    with contextlib.suppress(OSError):
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while True:
                with contextlib.suppress(BrokenPipeError):  # older lines have been overwritten while we read
                    line = os.read(descriptor, 8192).decode(errors="replace").partition(";")[2].partition("\n")[0]
                    if re.search(rf"[Kk]illed process {pid} ", line):
                        found = line.strip()
        except BlockingIOError:
            pass  # the end of it
        finally:
            os.close(descriptor)
    return found


def _cgroups_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    return ""


def _counters(cgroups: str) -> list[Path]:
    """The files that count kills in the cgroup which a process is in, whichever limit above it was hit."""
    paths: list[Path] = []
    for line in cgroups.splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":
            paths.append(CGROUPS / "memory" / place.lstrip("/") / "memory.oom_control")
        elif not controllers:
            paths.append(CGROUPS / place.lstrip("/") / "memory.events")
    return [path for path in paths if path.exists()]


def _number(path: Path) -> int:
    """The number after `oom_kill` in a file; 0 where there is none."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE):
            return int(match[1])
    return 0
