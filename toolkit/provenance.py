"""Where a run comes from: its code, its packages, the command that started it. Never its secrets."""

import importlib.metadata
import re
import subprocess
import sys
from typing import Any


def source_code() -> dict[str, Any]:
    """The git commit and uncommitted changes of the folder the command runs in; nothing outside a repository."""
    commit = _git("rev-parse", "HEAD")
    return {"git_commit": commit, "git_diff": _git("diff", "HEAD")[:100_000]} if commit else {}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, errors="replace", timeout=20, check=False
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
