"""`${env:NAME}` and `${section.key}` -> values."""

import re
from collections.abc import Mapping
from typing import Any

from toolkit.config.problems import declared
from toolkit.config.text import Path, Problem, scalar
from toolkit.secret import Secret

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
MAX_REFERENCES = 1000  # counting those that references lead to, which can double from key to key


class References:
    """Replaces the references of a tree, and remembers in `written` those texts that must be stored as they were."""

    def __init__(self, tree: Any, environment: Mapping[str, str], problems: list[Problem]) -> None:
        self.tree, self.environment, self.problems = tree, environment, problems
        self.written: dict[Path, str] = {}
        self.unresolved: set[Path] = set()
        self.left = MAX_REFERENCES

    def resolved(self, node: Any, path: Path) -> Any:
        """The node with every reference in it replaced; what cannot be is a problem, and None."""
        if isinstance(node, dict):
            return {key: self.resolved(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.resolved(value, (*path, index)) for index, value in enumerate(node)]
        if not isinstance(node, str) or "${" not in node:
            return node
        secrets: list[str] = []
        try:
            value = self._value(node, secrets, (), declared(path))
        except ValueError as error:
            self.problems.append(Problem(path, f"{node!r}: {error}"))
            self.unresolved.add(path)
            return None
        if secrets:
            self.written[path] = node
            return Secret(value, node) if isinstance(value, str) else value
        return value

    def _value(self, text: str, secrets: list[str], seen: tuple[str, ...], kind: Any) -> Any:
        """The text with its references replaced. One that is nothing but a reference has the type of what it names."""
        whole = _REFERENCE.fullmatch(text)
        if whole and kind is not str:
            return self._named(whole[1], secrets, seen, kind)
        return _REFERENCE.sub(lambda match: str(self._named(match[1], secrets, seen, str)), text)

    def _named(self, name: str, secrets: list[str], seen: tuple[str, ...], kind: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {MAX_REFERENCES} references in all; write values out")
        if name.startswith("env:"):
            secrets.append(name)
            if name[4:] not in self.environment:
                raise ValueError(f"the environment has no {name[4:]}; set it before the run starts")
            value = self.environment[name[4:]]
            # Of a component's argument the schema knows no type: its constructor's signature will say.
            return value if kind in (str, None) else scalar(value)
        if name in seen:
            raise ValueError(f"${{{name}}} refers to itself; write the value out")
        node: Any = self.tree
        for key in name.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        if node is None or isinstance(node, dict | list):
            raise ValueError(
                f"${{{name}}} names no value of this file; use ${{env:NAME}} or a key such as ${{run.name}}"
            )
        return self._value(node, secrets, (*seen, name), kind) if isinstance(node, str) else node
