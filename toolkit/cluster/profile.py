"""The cluster profile, slurm/*.yaml: what every job of one cluster shares. Checked like a job file."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from toolkit.config.problems import report, schema_problems
from toolkit.config.schema import Count, Section
from toolkit.config.text import Problem, parse
from toolkit.errors import JobError

Words = tuple[str, ...]
# Of sbatch's options, those that the plan sets itself, from the command line or from a key of its own in the profile.
OURS = {
    "array": "--sweep", "account": "account", "partition": "partition", "qos": "qos", "constraint": "constraint",
    "nodes": "--nodes", "gpus-per-node": "gpus_per_node", "gres": "gpus_per_node", "gpus": "gpus_per_node",
    "cpus-per-gpu": "cpus_per_gpu", "mem": "mem_gb_per_node", "mem-per-gpu": "mem_gb_per_gpu", "time": "time_min",
    "signal": "signal_lead_s", "requeue": "", "no-requeue": "", "no-kill": "", "export": "env", "output": "",
    "error": "", "open-mode": "", "ntasks": "", "ntasks-per-node": "", "wait": "--wait", "wrap": "", "container": "",
}  # fmt: skip
_FLAGS = {"time_min": "--time"}  # where it is not the key's own name


def _text(value: Any) -> Any:
    """A whole number is fine as an environment variable; `true` or `1.0` may mean several texts, and are not."""
    if isinstance(value, dict):
        return {key: str(item) if type(item) is int else item for key, item in value.items()}
    return value


class Container(Section):
    """How an image named by --container is run on the nodes."""

    runtime: Literal["pyxis", "apptainer", "charliecloud"] = Field("pyxis", description="what runs the image")
    mounts: Words = Field((), strict=False, description="SRC:DST or PATH, what of the node is seen inside")
    python: str = Field("python3", min_length=1, description="the image's Python, which must have toolkit's packages")
    args: Words = Field((), strict=False, description="more words for the runtime")


class Profile(Section):
    """One cluster profile. What is None is left to Slurm."""

    partition: str | None = Field(None, min_length=1, description="where jobs go; several, with commas: the first free")
    account: str | None = Field(None, min_length=1, description="who pays")
    qos: str | None = Field(None, min_length=1, description="quality of service")
    constraint: str | None = Field(None, min_length=1, description="features that nodes must have, such as a100&ib")
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs a node, and ranks; 0 trains on CPUs")
    cpus_per_gpu: Count | None = Field(None, description="CPUs a GPU")
    mem_gb_per_gpu: float | None = Field(None, gt=0, description="GB of memory a GPU")
    cpus_per_node: Count | None = Field(None, description="CPUs a node, for nodes without GPUs")
    mem_gb_per_node: float | None = Field(None, gt=0, description="GB of memory a node, for nodes without GPUs")
    time_min: Count | None = Field(None, description="minutes a job may take until it is saved and queued again")
    signal_lead_s: int = Field(120, ge=1, le=65535, description="seconds before the time limit at which Slurm warns us")
    env: Annotated[dict[str, str], BeforeValidator(_text)] = Field(
        {}, description="environment of all ranks, such as NCCL_SOCKET_IFNAME or OMP_NUM_THREADS"
    )
    modules: Words = Field((), strict=False, description="`module load` these before anything else, on every node")
    setup: Words = Field((), strict=False, description="shell lines, run as they stand after the modules")
    container: Container | None = Field(None, description="how --container IMAGE is run here")
    scratch: str | None = Field(None, min_length=1, description="folder that all nodes see, for Slurm's own files")
    shared: Words = Field(
        (), strict=False, description="folders that all nodes see; run.dir, scratch and a venv must be in one"
    )
    sbatch: dict[str, str | int | float | bool | None] = Field(
        {}, description="any other option of sbatch, without its dashes; true for one that takes no value"
    )

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        named = {name.lstrip("-").replace("_", "-") for name in options}
        if taken := sorted(named & OURS.keys()):
            words = ", ".join(f"{name} ({'use ' + OURS[name] if OURS[name] else 'toolkit sets it'})" for name in taken)
            raise ValueError(f"is not for options that have a place of their own: {words}")
        return options

    @field_validator("env")
    @classmethod
    def _names_of_variables(cls, env: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in env if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)]:
            raise ValueError(f"{wrong[0]!r} cannot be the name of an environment variable")
        return env

    @field_validator("modules")
    @classmethod
    def _names_of_modules(cls, modules: Words) -> Words:
        if wrong := [name for name in modules if not re.fullmatch(r"[\w.+/@:=-]+", name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a module, such as cuda/12.4; shell lines go under setup")
        return modules

    @field_validator("scratch", "shared")
    @classmethod
    def _absolute(cls, value: str | Words | None) -> str | Words | None:
        if wrong := [path for path in ((value,) if isinstance(value, str) else value or ()) if path[:1] != "/"]:
            raise ValueError(f"{wrong[0]!r} is not absolute, such as /shared/scratch: jobs start in another folder")
        return value

    def cpus(self, gpus: int) -> int | None:
        """CPUs a node with that many GPUs in use; None leaves it to Slurm."""
        return self.cpus_per_gpu * gpus if self.cpus_per_gpu and gpus else self.cpus_per_node

    def mem_gb(self, gpus: int) -> float | None:
        """GB of memory a node with that many GPUs in use; None leaves it to Slurm."""
        return self.mem_gb_per_gpu * gpus if self.mem_gb_per_gpu and gpus else self.mem_gb_per_node


def load_profile(path: str) -> Profile:
    """The profile in a file. Raises JobError that names all problems at once."""
    try:
        document = parse(_read(path))
    except ValueError as error:
        raise error if isinstance(error, JobError) else JobError(f"cluster profile {path}: {error}") from None
    problems, tree = document.problems, document.value if document.value is not None else {}
    profile = Profile()
    if not isinstance(tree, dict):
        problems.append(Problem((), "is not a mapping; a profile has keys such as `partition:`"))
    else:
        try:
            profile = Profile.model_validate(tree)
        except ValidationError as error:
            problems += schema_problems(error.errors(), {}, Profile)
    if problems:
        origin = {key: f"line {line}" for key, line in document.lines.items()}
        raise JobError(report(path, problems, origin, "cluster profile"))
    return profile


def overridden(profile: Profile, given: Mapping[str, Any]) -> Profile:
    """The profile with other values of some keys, which came as arguments or flags. Raises JobError that names both."""
    try:
        return Profile.model_validate(profile.model_dump(exclude_unset=True) | dict(given))
    except ValidationError as error:
        problems = schema_problems(error.errors(), {}, Profile)
    named = {str(path[0]): words for path, words in problems}
    lines = [f"{key} ({_FLAGS.get(key, '--' + key.replace('_', '-'))}): {words}" for key, words in named.items()]
    raise JobError("\n".join(lines))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        there = sorted(str(entry) for entry in folder.glob("*.yaml"))
        near = get_close_matches(path, there, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        hint += f"profiles there: {', '.join(there)}" if there else f"{folder} has no profiles (*.yaml)"
        raise JobError(f"cluster profile {path} does not exist; {hint}") from None
    except OSError as error:
        raise JobError(f"cluster profile {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        message = f"cluster profile {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise JobError(message) from None
