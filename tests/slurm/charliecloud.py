"""A container image for Charliecloud that is made in seconds, out of this machine and the Python that runs the tests.

`python -c "import torch, toolkit"` works in it, as root and as any other user:

    wrapped([image.python, "-c", "import torch"], container, image.folder, [str(ROOT)], names, workdir)

`image.mounts` must be among the container's mounts. It has this machine's commands, but not Slurm's.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("dev", "proc", "sys", "tmp", "run", "mnt", "etc", "var/tmp", "ch")  # ch-run asks for the first four
SLURM = "sacct sacctmgr salloc sattach sbatch sbcast scancel scontrol sdiag sinfo sprio squeue srun sstat".split()
LINKS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")  # into /usr, on every distribution of today


@dataclass(frozen=True)
class Image:
    folder: str
    python: str
    mounts: tuple[str, ...]


def install() -> None:
    """Have `ch-run` on this machine. Raises RuntimeError where that takes root and we are not."""
    if shutil.which("ch-run"):
        return
    if os.geteuid() != 0:
        raise RuntimeError("ch-run is not here: apt-get install charliecloud-runtime")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "charliecloud-runtime"]):
        subprocess.run(["apt-get", *words], env=os.environ | quiet, check=True, capture_output=True, timeout=300)


@contextmanager
def image(root: Path, *places: str) -> Iterator[Image]:
    """A new image as the folder `root`, removed in the end; `places` are where something can be mounted in it.

    Python and its packages are in it at their own paths, as hard links where the file system has them: another user
    may not reach them here (in /root, say). On one file system that takes seconds and no space, but what is written
    into the image is written here: leave it read-only.
    """
    for name in (*FOLDERS, *(place.lstrip("/") for place in places)):
        (root / name).mkdir(parents=True, exist_ok=True)
    mounts = _usr(root / "usr")
    for name in LINKS:
        if os.path.islink(f"/{name}"):
            (root / name).symlink_to(os.readlink(f"/{name}"))
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (root / "etc" / name).touch()  # ch-run puts those of the host here
    for name in ("ld.so.cache", "nsswitch.conf"):
        shutil.copy(f"/etc/{name}", root / "etc")
    home, packages = os.path.realpath(sys.base_prefix), os.path.realpath(sys.prefix)
    for place in {home, packages}:
        if not place.startswith("/usr/") and place != "/usr":
            _linked(place, root / place.lstrip("/"))
    try:
        yield Image(str(root), os.path.join(packages, "bin", os.path.basename(sys.executable)), mounts)
    finally:
        shutil.rmtree(root)


def _usr(target: Path) -> tuple[str, ...]:
    """Make /usr, and return what of it must be mounted: all but its commands."""
    _linked("/usr/bin", target / "bin", *SLURM)
    folders = [path for path in Path("/usr").iterdir() if path.name != "bin" and not path.is_symlink()]
    for folder in folders:
        (target / folder.name).mkdir()
    for link in (path for path in Path("/usr").iterdir() if path.is_symlink()):
        (target / link.name).symlink_to(link.readlink())
    return tuple(sorted(map(str, folders)))


def _linked(source: str, target: Path, *without: str) -> None:
    def link(one: str, other: str) -> None:
        try:
            os.link(one, other, follow_symlinks=False)
        except OSError:
            shutil.copy2(one, other, follow_symlinks=False)

    shutil.copytree(source, target, symlinks=True, copy_function=link, ignore=shutil.ignore_patterns(*without))
