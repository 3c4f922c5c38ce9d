"""A command in a container -> flags for srun, and the words before the command. Nothing is run here.

Flags go to srun and never into the batch script's #SBATCH lines, with which some nodes have run outside of it
(https://github.com/NVIDIA/pyxis/issues/29), and containers are never named: one left over from another job would be
taken for the image. Values of variables never stand on a command line, where all users of a node can read them.
"""

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from toolkit.errors import JobError

RUNTIMES = ("pyxis", "apptainer", "charliecloud")
# What a job needs of its environment, though the image may have variables of these names too. Not what differs from
# node to node, such as CUDA_VISIBLE_DEVICES: Slurm sets that in each task, and no image does.
_HANDED_IN = re.compile(
    r"TOOLKIT_(?!IMAGE_COMMIT$).*|PYTHON(PATH|SAFEPATH|UNBUFFERED)|(OMP|MKL|OPENBLAS)_NUM_THREADS|(NCCL|GLOO|TORCH)_.*"
    r"|(AWS|AZURE|GOOGLE|GCSFS|FSSPEC)_.*|SSH_AUTH_SOCK|(?i:(https?|no)_proxy)"
)


class Container(Protocol):
    """What a cluster's profile says of its containers."""

    @property
    def runtime(self) -> str:
        """One of RUNTIMES."""

    @property
    def mounts(self) -> Sequence[str]:
        """`SRC:DST` or `PATH`, absolute."""

    @property
    def args(self) -> Sequence[str]:
        """More options for the runtime; pyxis's are srun's."""


def handed_in(names: Iterable[str]) -> list[str]:
    """Those of some environment variables that a job needs in its container, sorted: also the credentials of stores."""
    return sorted(name for name in names if _HANDED_IN.fullmatch(name))


def wrapped(
    command: Sequence[str],
    container: Container,
    image: str,
    binds: Sequence[str],
    names: Iterable[str],
    workdir: str,
    gpus: bool = False,
) -> tuple[list[str], list[str]]:
    """(flags of srun, words to run) for a command in a container, with its mounts and `binds` in it.

    `names` are the variables that keep the value they have outside, whatever the image says; `additions` must be in
    srun's environment. What `binds` names by PATH has the same path inside. Raises JobError for a path or image that
    the runtime cannot express.
    """
    runtime, variables = container.runtime, sorted(set(names))
    _refuse_image(runtime, image)
    mounts = _mounts(runtime, [*container.mounts, *binds])
    if not posixpath.isabs(workdir):
        raise JobError(f"working directory {workdir!r} of a container is not an absolute path")
    if wrong := [name for name in variables if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
        raise JobError(f"{wrong[0]!r} is no name of an environment variable")
    if runtime == "pyxis":
        home = "--container-mount-home" in container.args  # pyxis refuses both
        return [*_pyxis(image, mounts, variables, workdir, home), *container.args], [*command]
    if runtime == "apptainer":
        return [], [*_apptainer(mounts, workdir, gpus), *container.args, image, *command]
    return [], [*_charliecloud(mounts, workdir), *container.args, image, "--", *command]


def additions(container: Container, environment: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """What must be added to srun's environment so that the container has these variables of it."""
    if container.runtime == "apptainer":  # the image's own values win over all but these
        return {f"APPTAINERENV_{name}": environment[name] for name in sorted(names) if name in environment}
    if container.runtime == "charliecloud":  # refuses to start without
        return {"USER": environment.get("USER") or environment.get("LOGNAME") or "user"}
    return {}


def _pyxis(image: str, mounts: Sequence[tuple[str, str]], names: Sequence[str], workdir: str, home: bool) -> list[str]:
    """https://github.com/NVIDIA/pyxis/blob/master/args.c: the image's variables win over all that are not named.

    --container-env came with pyxis 0.15 (2023).
    """
    return [
        f"--container-image={image}",
        *[f"--container-mounts={','.join(f'{source}:{target}' for source, target in mounts)}"] * bool(mounts),
        f"--container-workdir={workdir}",
        *["--no-container-mount-home"] * (not home),
        *[f"--container-env={','.join(names)}"] * bool(names),
    ]


def _apptainer(mounts: Sequence[tuple[str, str]], workdir: str, gpus: bool) -> list[str]:
    # Without the home directory, whose ~/.local would be imported before the image's packages.
    binds = [word for source, target in mounts for word in ("--bind", f"{source}:{target}")]
    return ["apptainer", "exec", *["--nv"] * gpus, "--no-home", *binds, "--pwd", workdir]


def _charliecloud(mounts: Sequence[tuple[str, str]], workdir: str) -> list[str]:
    """Every bind's place must exist in an image, unless `args` has --write (0.36 and newer: --write-fake).

    /dev is always the host's, GPUs included; their libraries are put into the image once, by `ch-fromhost --nvidia`.
    """
    # /tmp is always the host's, and a bind below it would be refused; with TMPDIR it would be another folder's.
    wanted = [one for one in mounts if one[0] != one[1] or not _lies_in(one[0], "/tmp")]  # noqa: S108
    return [
        "env",
        "-u",
        "TMPDIR",
        "ch-run",
        *[f"--bind={source}:{target}" for source, target in wanted],
        f"--cd={workdir}",
    ]


def _mounts(runtime: str, given: Sequence[str]) -> list[tuple[str, str]]:
    """(path outside, path inside) of each bind that is needed: not again what another one has brought in already."""
    found: list[tuple[str, str]] = []
    for bind in given:
        source, colon, target = bind.partition(":")
        pair = (posixpath.normpath(source), posixpath.normpath(target if colon else source))
        if not (posixpath.isabs(source) and posixpath.isabs(pair[1])) or ":" in target:
            raise JobError(
                f"mount {bind!r}: give PATH or SRC:DST, both absolute; a path with a colon cannot be mounted"
            )
        if bad := re.search(_CANNOT[runtime], source + target):
            raise JobError(f"mount {bind!r}: {runtime} cannot mount a path with {bad[0]!r} in it; use a path without")
        found.append(pair)
    there = {target: source for source, target in found}
    if twice := [pair for pair in found if there[pair[1]] != pair[0]]:
        raise JobError(f"mounts {twice[0][0]!r} and {there[twice[0][1]]!r} have one place, {twice[0][1]!r}; keep one")
    pairs = [(source, target) for target, source in sorted(there.items())]  # what lies in another comes after it
    return [pair for pair in pairs if pair[0] != pair[1] or not _is_there(pair[1], there)]


def _is_there(path: str, there: Mapping[str, str]) -> bool:
    """Whether a mount of the folder around it, if it is the innermost, has brought in a path already."""
    around = max((other for other in there if other != path and _lies_in(path, other)), key=len, default=None)
    return around is not None and there[around] == around


# pyxis lists mounts with commas, and gives each to enroot as a line of words; \ begins an octal number there.
_CANNOT = {"pyxis": r"[,\\\s\x00]", "apptainer": r'[,\\"\n\x00]', "charliecloud": r"[\n\x00]"}


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _refuse_image(runtime: str, image: str) -> None:
    if runtime not in RUNTIMES:
        raise JobError(f"container runtime {runtime!r} is not known; it is one of {', '.join(RUNTIMES)}")
    if not image or image.startswith("-") or not image.isprintable():
        raise JobError(f"container image {image!r} is no image; give an absolute path, or a name as {runtime} takes it")
    if image.startswith(("./", "../", "~")):
        raise JobError(f"container image {image!r}: give an absolute path, which is the same on every node")
    registry, slash, rest = image.partition("/")
    if runtime == "pyxis" and slash and re.search(r"^localhost$|[.:]", registry) and not re.search(r"#|://", image):
        raise JobError(f"container image {image!r}: pyxis wants a # after the registry: {registry}#{rest}")
