"""What tests of the cluster share: the testbed, jobs followed until they are where they should be, faults on nodes."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from toolkit.cluster import slurm

ROOT = Path(__file__).parents[2]
BED = ROOT / "slurm/testbed/cluster"
NODES = (1, 2, 3, 4)
USABLE = ("idle", "mixed", "allocated")  # someone may be using the testbed beside the tests


def words_of(*command: object, timeout_s: float = 120, **options: Any) -> str:
    """What a command prints. It must succeed; while Slurm does not answer it is asked again, for half a minute."""
    words, end_s = [str(word) for word in command], time.monotonic() + 30
    while True:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout_s, **options)
        if not done.returncode or not slurm._AWAY.search(done.stderr) or time.monotonic() > end_s:
            break
        time.sleep(0.5)
    assert done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Cluster:
    """The testbed, seen by one test: a workplace that all nodes see, and everything its jobs may need done to them."""

    def __init__(self, place: Any) -> None:
        self.place, self.folder = place, place.folder
        self.hurt = False

    def toolkit(self, *words: str, status: int = 0, timeout_s: float = 300, **environment: str) -> str:
        """`toolkit WORDS` as a user types it on the login node. Returns stdout and stderr together."""
        return self.place.run(*words, status=status, timeout_s=timeout_s, **environment)

    def sbatch(self, script: str, *options: str) -> str:
        """Queue a shell script, and return the job's number. Its output goes to NUMBER.out."""
        file = self.folder / "job.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        return words_of("sbatch", "--parsable", "--output", "%j.out", *options, file, cwd=self.folder).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, NodeList, BatchHost, Restarts, ..."""
        pairs = (pair.partition("=") for pair in words_of("scontrol", "show", "job", "--oneliner", job).split())
        return {key: value for key, _, value in pairs}

    def jobs(self) -> list[str]:
        """The test's own jobs that are queued, running or completing."""
        lines = words_of("squeue", "--noheader", "--format", "%A %Z").splitlines()
        return [job for job, _, folder in (line.partition(" ") for line in lines) if self.owns(folder)]

    def owns(self, folder: str) -> bool:
        return Path(folder).is_relative_to(self.folder)

    def until(self, reached: Callable[[], Any], what: str, timeout_s: float = 180) -> Any:
        """The answer, as soon as it is true."""
        end = time.monotonic() + timeout_s
        while True:
            last = time.monotonic() > end  # asked once more after the end: a command may have hung
            if answer := reached():
                return answer
            assert not last, f"no sign of {what} in {timeout_s:.0f} s\n{self.report()}"
            time.sleep(0.1)

    def wait(self, job: str, *states: str, timeout_s: float = 180, restarts: int = 0) -> dict[str, str]:
        """Wait until a job is in one of the states and has been started again that often. What `show` says then."""

        def there() -> dict[str, str] | None:
            now = self.show(job)
            return now if now["JobState"] in states and int(now["Restarts"]) >= restarts else None

        return self.until(there, f"job {job} being {' or '.join(states)}", timeout_s)

    def cancel(self, *jobs: str) -> None:
        words_of("scancel", "--quiet", *jobs)

    def report(self) -> str:
        """What is needed to understand a failure: the queue, the nodes, and the ends of the jobs' output."""
        outputs = [f"--- {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.out"))]
        return "\n".join([words_of(BED, "status"), *outputs])

    def node_state(self, node: int) -> str:
        """idle, mixed, allocated, completing, down, ...; with a * where the node does not answer."""
        # of all nodes: asked for a single one, sinfo counts CPUs of jobs that have just ended, and calls a node mixed
        listed = words_of("sinfo", "--noheader", "--Node", "--partition", "main", "--format", "%N %T").split()
        return dict(zip(listed[::2], listed[1::2], strict=True))[f"n{node}"]

    def wait_node(self, node: int, *states: str, timeout_s: float = 120) -> str:
        return self.until(
            lambda: (now := self.node_state(node).rstrip("*")) in states and now, f"n{node} {states}", timeout_s
        )

    def execute(self, node: int, *command: object) -> str:
        """What a command prints on a node."""
        return words_of(BED, "exec", node, *command)

    def harm(self, *words: object) -> None:
        """One of the testbed's faults. `tidy` mends them all."""
        self.hurt = True
        words_of(BED, *words)

    def node_kill(self, node: int) -> None:
        """The node loses power."""
        self.harm("node-kill", node)

    def node_boot(self, node: int) -> None:
        words_of(BED, "node-boot", node)

    def net_cut(self, node: int) -> None:
        """The node's cable is pulled; what runs there goes on."""
        self.harm("net-cut", node)

    def net_join(self, node: int) -> None:
        words_of(BED, "net-join", node)

    def slurmd_kill(self, node: int) -> None:
        self.harm("slurmd-kill", node)

    def slurmd_start(self, node: int) -> None:
        words_of(BED, "slurmd-start", node)

    def slurmctld_kill(self) -> None:
        """The controller dies, and forgets what has happened in the last seconds: it saves its state every five."""
        self.harm("slurmctld-kill")

    def slurmctld_start(self) -> None:
        words_of(BED, "slurmctld-start")

    def processes(self) -> list[psutil.Process]:
        """What the test's jobs run on the nodes, at this moment."""
        found = []
        for process in psutil.process_iter():
            try:
                folder = process.environ().get("SLURM_SUBMIT_DIR")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if folder and self.owns(folder):
                found.append(process)
        return found

    def tidy(self) -> None:
        """Cancel what the test has left, and mend what it has broken. Fails if a job's processes outlive the job."""
        if self.hurt:
            words_of(BED, "up", timeout_s=300)
        if left := self.jobs():
            self.cancel(*left)
        self.until(lambda: not self.jobs(), "the end of cancelled jobs")
        self.until(lambda: all(self.node_state(node) in USABLE for node in NODES), "four usable nodes")
        end = time.monotonic() + 5
        while (alive := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        for process in alive:
            process.kill()
        assert not alive, f"processes left on nodes: {alive}"


def missing() -> str:
    """Why there can be no testbed here, or ''."""
    if os.geteuid() != 0:
        return "the Slurm testbed needs root"
    return "" if shutil.which("apt-get") else "the Slurm testbed needs apt-get"


# One line for the whole folder, where a skip would be one for every test.
collect_ignore_glob = ["test_*.py"] if missing() and os.environ.get("CI") != "true" else []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if collect_ignore_glob:
        terminalreporter.write_line(f"SKIPPED tests/slurm: {missing()}")


@pytest.fixture(scope="session")
def testbed() -> Iterator[None]:
    """The testbed, up, and at the end as it was found."""
    assert not missing(), missing()
    was_up = "slurmctld: up" in words_of(BED, "status")
    words_of(BED, "up", timeout_s=800)
    yield
    if not was_up:
        words_of(BED, "down", timeout_s=300)


@pytest.fixture
def cluster(testbed: None, workplace: Any) -> Iterator[Cluster]:
    """The testbed, whole and without a job of the test's before and after it."""
    here = Cluster(workplace)
    yield here
    here.tidy()
