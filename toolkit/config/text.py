"""YAML text -> plain values, by the YAML 1.2 core schema. The only door to PyYAML.

PyYAML speaks YAML 1.1, where `1e-3` is a string, `on` a boolean, `2:30` the number 150 and `010` the number 8. Here
only its parser is used; what a scalar means is decided below (https://yaml.org/spec/1.2.2/#103-core-schema). Tags,
anchors, aliases and duplicate keys are refused with their line: a job file has no use for them, and each has hidden a
mistake or an attack.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

Path = tuple[str | int, ...]
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 32
_STAR = "a pattern that begins with * needs quotes: ['*.bias'], and in a shell so does the whole KEY=VALUE"

_CONSTANTS: dict[str, Any] = {"": None, "~": None} | {
    spelling: value
    for word, value in {"null": None, "true": True, "false": False}.items()
    for spelling in (word, word.capitalize(), word.upper())
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Problem(NamedTuple):
    """Something wrong with a job file: where, and in words."""

    path: Path
    message: str


class Document(NamedTuple):
    """What a text says: its values, the line of each key, and the problems met on the way."""

    value: Any
    lines: dict[Path, int]
    problems: list[Problem]


def scalar(text: str) -> Any:
    """The value of an unquoted scalar: null, true, false, an integer, a float, else the text itself."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    # A leading zero ("010") is octal to some readers and decimal to others, so it stays text and the declared type
    # decides.
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?[0-9]+", text):
        return float(text)
    return text


def parse(text: str) -> Document:
    """Read one YAML document. Raises ValueError with line and column where the text is not YAML at all."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"is {len(text)} characters long; a job file has at most {MAX_CHARACTERS}")
    try:
        events = (e for e in yaml.parse(text, Loader=yaml.SafeLoader) if isinstance(e, _CONTENT))
        reader = _Reader(events)
        first = next(events, None)
        value = reader.value(first, ()) if first is not None else None
        if next(events, None) is not None:
            raise ValueError("holds more than one YAML document; keep the first")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        of_alias = f"; {_STAR}" if "alias" in (error.context or "") else ""
        raise ValueError(f"{where}{error.problem}{of_alias}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position}: {error.reason}") from None
    return Document(value, reader.lines, reader.problems)


def dump(tree: Any) -> str:
    """YAML text that `parse` reads back to the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def quoted(text: str) -> str:
    """The text as a scalar of one line that `parse` reads back to it, whatever is in it."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


_CONTENT = (yaml.NodeEvent, yaml.CollectionEndEvent)


class _Reader:
    def __init__(self, events: Iterator[Any]) -> None:
        self.events = events
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []

    def value(self, event: Any, path: Path) -> Any:
        line = event.start_mark.line + 1
        self.lines.setdefault(path, line)
        if isinstance(event, yaml.AliasEvent):
            self.problems.append(
                Problem(path, f"*{event.anchor}: aliases are not allowed; write the value out; {_STAR}")
            )
            return None
        if event.anchor is not None:
            self.problems.append(
                Problem(path, f"&{event.anchor}: anchors are not allowed; write the value where it is used")
            )
        if event.tag is not None:
            self.problems.append(Problem(path, f"{event.tag}: tags are not allowed; write the plain value"))
        if len(path) > MAX_DEPTH:
            raise ValueError(f"line {line}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return [self.value(item, (*path, index)) for index, item in enumerate(self._children())]
        return scalar(event.value) if event.style is None else event.value

    def _children(self) -> Iterator[Any]:
        while not isinstance(event := next(self.events), yaml.CollectionEndEvent):
            yield event

    def _mapping(self, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for event in self._children():
            line: int = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                of_alias = f"; {_STAR}" if isinstance(event, yaml.AliasEvent) else ""
                raise ValueError(f"line {line}: a key must be a plain word{of_alias}")
            key: str = event.value
            if key in result:
                first = self.lines[(*path, key)]
                self.problems.append(Problem((*path, key), f"is given twice, first in line {first}; keep one"))
            self.lines[(*path, key)] = line
            result[key] = self.value(next(self.events), (*path, key))
        return result


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write a list that appears twice in full each time: `parse` refuses aliases."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if scalar(text) is not text or not text.isprintable() else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
