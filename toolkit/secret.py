"""A text that came from the environment. Errors and files show where it came from, never what it says."""

import re
from typing import Any


class Secret(str):
    """Acts as its text; `repr`, which messages use, is what the job file says instead, such as '${env:TOKEN}'."""

    written: str

    def __new__(cls, text: str, written: str) -> "Secret":
        secret = super().__new__(cls, text)
        secret.written = written
        return secret

    def __repr__(self) -> str:
        return repr(self.written)

    def __reduce__(self) -> tuple[type["Secret"], tuple[str, str]]:
        return Secret, (str(self), self.written)


_LEAST = 4  # characters of a secret that is looked for: a shorter one is found everywhere


def as_written(words: str, tree: Any) -> str:
    """Words in which each secret of a tree of values stands as it was written, such as what a library says of one."""
    if isinstance(tree, dict | list):
        for node in tree.values() if isinstance(tree, dict) else tree:
            words = as_written(words, node)
    if isinstance(tree, Secret) and len(tree) >= _LEAST:
        words = re.sub(rf"(?<!\w){re.escape(tree)}(?!\w)", lambda match: tree.written, words)
    return words
