"""Where a run comes from: its code, its packages, the command that started it. Never its secrets."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def source_code(folder: str) -> dict[str, Any]:
    """The git commit and uncommitted changes of the code in a folder; nothing outside a repository.

    In a snapshot of a repository (`toolkit/cluster/snapshot.py`) they are those it was taken with.
    """
    for root in (Path(folder), *Path(folder).parents):
        if (root / "SNAPSHOT.json").is_file() and (root / "SNAPSHOT.diff").is_file():
            commit = json.loads((root / "SNAPSHOT.json").read_bytes())["commit"]
            diff = (root / "SNAPSHOT.diff").read_text(encoding="utf-8", errors="replace").strip()
            return {"git_commit": commit, "git_diff": diff[:100_000]}
    commit = _git(folder, "rev-parse", "HEAD")
    return {"git_commit": commit, "git_diff": _git(folder, "diff", "HEAD")[:100_000]} if commit else {}


def _git(folder: str, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def packages() -> dict[str, str]:
    """Every installed distribution and its version, and Python's."""
    about = [found.metadata for found in importlib.metadata.distributions()]  # parsed anew at each use
    return {one["Name"]: one["Version"] for one in about if one["Name"]} | {"python": sys.version.split()[0]}


def without_secrets(word: str) -> str:
    """A word of a command line without passwords: those in URLs, and the values of keys that sound like one."""
    word = re.sub(r"(://)[^/\s]*@", r"\1…@", word)
    word = re.sub(r"(?i)([?&][^=&]*(secret|token|password|credential|key|sig)[^=&]*)=[^&\s]*", r"\1=…", word)
    return re.sub(r"(?i)^([^=]*(secret|token|password|credential|key)[^=]*)=.*", r"\1=…", word)
