"""Whether the kernel has killed a process for want of memory: a SIGKILL does not say where it comes from.

Three witnesses, where they can be heard: the kernel's log, which names the process; the counters of the process's
cgroup (v2 `memory.events`, v1 `memory.oom_control`; Linux, Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst); the machine's own counter in /proc/vmstat.
"""

import contextlib
import os
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


class OomWatch:
    """Looks at the counters when it is made, and again when somebody was killed."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}
        self._machine = _number(Path("/proc/vmstat"))

    def watch(self, pid: int) -> None:
        """Remember the counters of a process's cgroup, while it lives."""
        for path in _counters(_cgroups_of(pid)):
            self._before.setdefault(path, _number(path))

    def verdict(self, pid: int) -> str | None:
        """Words on how it is known that a process was killed for want of memory; None if nothing says so."""
        if line := said_by_kernel(pid):
            return f"the kernel's log says: {line}"
        for path, before in self._before.items():
            if (count := _number(path)) > before:
                return f"{path} has counted {count - before} more since the start"
        if _number(Path("/proc/vmstat")) > self._machine:
            return "the kernel has killed for want of memory on this machine meanwhile (oom_kill in /proc/vmstat)"
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
    """The files that count kills of the cgroups which a process is in, its own and those above it."""
    paths: list[Path] = []
    for line in cgroups.splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":
            paths.append(CGROUPS / "memory" / place.lstrip("/") / "memory.oom_control")
        elif not controllers:
            group = CGROUPS / place.lstrip("/")
            paths += [each / "memory.events" for each in (group, *group.parents) if each.is_relative_to(CGROUPS)]
    return [path for path in paths if path.exists()]


def _number(path: Path) -> int:
    """The number after `oom_kill` in a file; 0 where there is none."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE):
            return int(match[1])
    return 0
