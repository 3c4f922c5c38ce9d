"""What the cluster can give, as `sinfo` has it, and whether it could ever give what is asked for."""

import math
import re
from dataclasses import dataclass

from toolkit.cluster.slurm import NoSlurmError, ask
from toolkit.errors import JobError

_FORMAT = "%P|%a|%l|%D|%c|%m|%G"


@dataclass(frozen=True)
class Shape:
    """Nodes of one partition that are alike."""

    nodes: int
    cpus: int
    mem_mb: int
    gpus: int

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else ""
        return f"{self.nodes} nodes of {self.cpus} CPUs, {self.mem_mb / 1024:.1f} GB{gpus}"


@dataclass(frozen=True)
class Partition:
    """A partition, whatever its nodes are doing now."""

    name: str
    default: bool
    state: str  # up; down: jobs wait; drain, inact: none is taken
    max_min: float  # inf where there is no limit
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        limit = "no time limit" if math.isinf(self.max_min) else f"at most {self.max_min:g} min"
        notes = [note for note, holds in (("default", self.default), (self.state, self.state != "up")) if holds]
        name = f"{self.name} ({', '.join(notes)})" if notes else self.name
        return f"{name}: {'; '.join(map(str, self.shapes))}; {limit}"

    def fitting(self, asked: "Asked") -> int:
        """How many of its nodes could take a share of a job, were they up and free."""
        return sum(shape.nodes for shape in self.shapes if _fits(shape, asked))


@dataclass(frozen=True)
class Asked:
    """What a job asks for; None where it leaves that to Slurm. Several partitions, with commas, are alternatives."""

    partition: str | None = None
    nodes: int = 1  # at least
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    mem_gb_per_node: float | None = None
    time_min: float | None = None


def partitions() -> list[Partition] | None:
    """Every partition of this cluster; None where there is no `sinfo`. Raises SlurmError if Slurm does not answer."""
    try:
        answer = ask("sinfo", "--all", "--exact", "--noheader", "--format", _FORMAT, patience_s=10)
    except NoSlurmError:
        return None
    return parsed(answer)


def parsed(answer: str) -> list[Partition]:
    """The partitions of what `sinfo` prints, a line for each kind of node in each."""
    found: dict[str, Partition] = {}
    for line in answer.splitlines():
        name, state, limit, nodes, cpus, mem_mb, gres = line.split("|")
        shape = Shape(int(nodes), int(cpus), int(mem_mb), _gpus(gres))
        key = name.rstrip("*")
        before = found[key].shapes if key in found else ()
        found[key] = Partition(key, name.endswith("*"), state, _minutes(limit), (*before, shape))
    return list(found.values())


def check(asked: Asked) -> None:
    """Raises JobError, before anything is queued, that lists what no partition asked for could ever give.

    Does nothing where there is no `sinfo`.
    """
    there = partitions()
    if there is not None:
        check_against(there, asked)


def check_against(there: list[Partition], asked: Asked) -> None:
    """As `check`, against partitions that are known."""
    by_name = {partition.name: partition for partition in there}
    names = asked.partition.split(",") if asked.partition else [p.name for p in there if p.default]
    listed = "\n".join(f"  {partition}" for partition in there)
    if not names:
        raise JobError(
            f"this cluster has no default partition; name one, with --partition or in the profile:\n{listed}"
        )
    if unknown := [name for name in names if name not in by_name]:
        raise JobError(f"there is no partition {', '.join(unknown)}; choose one of\n{listed}")
    problems = {name: _problems(by_name[name], asked) for name in names}
    if all(problems.values()):
        lines = [f"partition {name}: {problem}" for name, found in problems.items() for problem in found]
        raise JobError("\n".join(lines) + f"\nask for less, or choose another partition:\n{listed}")


def _problems(partition: Partition, asked: Asked) -> list[str]:
    """What a partition could not give though all its nodes were up and free."""
    found = []
    if partition.state in ("drain", "inact"):
        found.append(f"takes no jobs now: it is {partition.state}")
    if asked.time_min and asked.time_min > partition.max_min:
        found.append(f"{asked.time_min:g} min were asked for, and at most {partition.max_min:g} min are allowed")
    shapes = partition.shapes
    wanted = (
        ("GPUs a node", asked.gpus_per_node, [shape.gpus for shape in shapes]),
        ("CPUs a node", asked.cpus_per_node, [shape.cpus for shape in shapes]),
        ("GB a node", asked.mem_gb_per_node, [shape.mem_mb / 1024 for shape in shapes]),
    )
    for what, count, has in wanted:
        if count and count > max(has):
            found.append(f"{count:g} {what} were asked for, and no node has more than {max(has):.4g}")
    fitting = partition.fitting(asked)
    total = sum(shape.nodes for shape in shapes)
    if asked.nodes > total:
        found.append(f"{asked.nodes} nodes were asked for, and it has {total}")
    elif asked.nodes > fitting and not found:
        found.append(f"{asked.nodes} nodes were asked for, and only {fitting} of its {total} have all the rest")
    return found


def _fits(shape: Shape, asked: Asked) -> bool:
    return (
        shape.gpus >= (asked.gpus_per_node or 0)
        and shape.cpus >= (asked.cpus_per_node or 0)
        and shape.mem_mb >= (asked.mem_gb_per_node or 0) * 1024
    )


def _gpus(gres: str) -> int:
    """GPUs of a node: `gpu:2`, `gpu:a100:4(S:0-1),nvme:1`, or of two kinds, `gpu:a100:4,gpu:v100:2`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def _minutes(limit: str) -> float:
    """Minutes of `[days-]hours:minutes:seconds`, `minutes:seconds`, `infinite`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if not match:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60
