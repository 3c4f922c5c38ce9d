"""What is asked of Slurm for a job, and what runs there: pure, from job, profile and flags to lists of words."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.cluster.agent import SUPERVISOR, TOKEN
from toolkit.cluster.containers import additions, handed_in, wrapped
from toolkit.cluster.partitions import Asked
from toolkit.cluster.profile import Container, Profile
from toolkit.config import Job
from toolkit.errors import JobError

AGENT = "toolkit.cluster.agent"
IMAGE = "TOOLKIT_IMAGE"  # what provenance says of it


class Nodes(NamedTuple):
    """How many nodes a run may have at a time."""

    least: int = 1
    most: int = 1

    @classmethod
    def parsed(cls, text: str) -> "Nodes":
        """`2`, or `1:4` for any number from one to four."""
        match = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", text, re.ASCII)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise JobError(f"--nodes {text} is neither a number of nodes, such as 2, nor a range, such as 1:4")
        return cls(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.least < self.most else str(self.most)


@dataclass(frozen=True)
class Plan:
    """One job on one cluster."""

    job: Job
    profile: Profile
    nodes: Nodes
    image: str | None = None

    @property
    def gpus(self) -> int:
        return self.profile.gpus_per_node or 0

    @property
    def processes(self) -> int:
        """Ranks a node: one a GPU; without GPUs as many as the job says, else one."""
        wanted = self.job.launch.processes
        return self.gpus or (wanted if isinstance(wanted, int) else 1)

    def additions(self, environment: Mapping[str, str]) -> dict[str, str]:
        """What srun's environment needs besides, for the container to have what it must of it."""
        if not self.container or not self.image:
            return {}
        told = {IMAGE: self.image}
        outside = dict(environment) | told
        return told | additions(self.container, outside, self.handed_in(outside))

    def handed_in(self, environment: Mapping[str, str]) -> list[str]:
        """The variables that a container gets from outside: ours, the profile's, those that the job names."""
        written = " ".join(self.job._written.values())
        named = re.findall(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)", written)
        return sorted({*handed_in([*environment, SUPERVISOR, TOKEN, IMAGE]), *self.profile.env, *named})

    @property
    def container(self) -> Container | None:
        return (self.profile.container or Container()) if self.image else None

    def check(self) -> None:
        """Raises JobError if the job cannot be shared among the ranks of so many nodes, or Slurm's script not be
        written.
        """
        self.job.check_ranks(self.nodes.most * self.processes)
        for name, value in self.options().items():
            if not re.fullmatch("[A-Za-z][A-Za-z0-9-]*", name) or not str(value).isprintable():
                raise JobError(
                    f"sbatch takes no option {name!r} with the value {value!r}: it is to be one line of text"
                )

    def asked(self) -> Asked:
        """What a partition must offer."""
        profile = self.profile
        return Asked(
            profile.partition, self.nodes.least, self.gpus or None, profile.cpus(self.gpus), profile.mem_gb(self.gpus),
            profile.time_min,
        )  # fmt: skip

    def options(self) -> dict[str, str | int | float | bool]:
        """What sbatch is given, by the names of its options; True for those that take no value.

        Nothing of tasks: with --ntasks-per-node Slurm takes the fewest nodes of a range, without it as many as it can.
        """
        profile, nodes = self.profile, self.nodes
        memory_gb = profile.mem_gb(self.gpus)
        options = {
            "job-name": self.job.run.name,
            "nodes": f"{nodes.least}-{nodes.most}" if nodes.least < nodes.most else nodes.most,
            "cpus-per-task": profile.cpus(self.gpus),
            "gpus-per-node": self.gpus or None,
            "mem": f"{memory_gb * 1024:.0f}M" if memory_gb else None,
            "time": profile.time_min,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "signal": f"B:USR2@{profile.signal_lead_s}",  # to the batch step only, whose supervisor tells the ranks
            "requeue": True,
            "no-kill": True if nodes.least < nodes.most else None,  # a dead node leaves the others to us
        }
        given = options | {name.replace("_", "-"): value for name, value in profile.sbatch.items()}
        return {name: value for name, value in given.items() if value is not None and value is not False}

    def setup(self, cwd: str, python_path: Sequence[str] = (), code: str = "") -> list[str]:
        """Lines of shell before the supervisor; what comes from the user is quoted."""
        exported = dict(self.profile.env) | ({"TOOLKIT_CODE": code} if code else {})
        loads = [f"module load {shlex.quote(name)}" for name in self.profile.modules]
        lines = [f'{load} || {{ echo "{load} has failed" >&2; exit 1; }}' for load in loads]
        lines += list(self.profile.setup)
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(exported.items())]
        if python_path:  # the code as it was; never what lies in the folder now
            path = shlex.quote(":".join(python_path))
            lines.append(f'export PYTHONSAFEPATH=1 PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"')
        return [*lines, f"cd {shlex.quote(cwd)} || exit 1", "trap '' USR2  # until the supervisor listens"]

    def supervisor(self, job_file: str, cluster_file: str) -> list[str]:
        """The command of the batch step."""
        words = [sys.executable, "-m", "toolkit", "supervise", job_file, "--cluster", cluster_file]
        words += ["--nodes", str(self.nodes)]
        return [*words, *(["--container", self.image] if self.image else [])]

    def srun(self, hosts: Sequence[str], binds: Sequence[str], cwd: str, environment: Mapping[str, str]) -> list[str]:
        """The command that starts an agent on each of these nodes. It asks for all that the job has there, also where
        another step has been left that Slurm believes to be alive.
        """
        count, flags = len(hosts), ["--no-kill"] if self.nodes.least < self.nodes.most else []
        words = [
            "srun", "--overlap", "--kill-on-bad-exit=1", "--mpi=none", "--cpu-bind=none", "--export=ALL",
            f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}", *flags,
        ]  # fmt: skip
        if cpus := self.profile.cpus(self.gpus):
            words.append(f"--cpus-per-task={cpus}")  # srun does not take it from the job
        agent = [sys.executable, "-m", AGENT]
        if self.container and self.image:
            agent[0] = self.container.python
            names = self.handed_in(environment)
            more, agent = wrapped(agent, self.container, self.image, binds, names, cwd, self.gpus > 0)
            words += more
        return [*words, *agent]
