"""A `{name, args}` of the job file becomes the object it means, or an error that says why not."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.components import build
from toolkit.config import Component
from toolkit.errors import JobError
from toolkit.secret import Secret

REGISTRY = {"net": "own_parts:Net", "cnn": "own_parts:Open"}

OWN = """
from typing import Literal

class Net:
    def __init__(self, width: int, rates: tuple[float, ...] = (), kind: Literal["a", "b"] = "a",
                 classes: int = 2, *, deep: bool = False):
        self.given = {"width": width, "rates": rates, "kind": kind, "classes": classes, "deep": deep}

    class Inner:
        given = {}

class Open:
    def __init__(self, first, **rest):
        self.given = {"first": first, **rest}

class Odd:
    def __init__(self, size: "ForTypeCheckersOnly"):
        self.given = {"size": size}

def broken(width=1):
    raise OSError("no space left")

number = 3
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module of the user's own where imports find it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> Path:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
        return tmp_path / f"{name}.py"

    write("own_parts", OWN)
    return write


def made(name: str, args: dict[str, Any], *positional: Any, **offers: Any) -> Any:
    return build("model", Component(name=name, args=args), REGISTRY, *positional, offers=offers).given


def refused(name: str, args: dict[str, Any], *positional: Any, **offers: Any) -> str:
    with pytest.raises(JobError) as error:
        made(name, args, *positional, **offers)
    return str(error.value)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["net", "own_parts:Net"])
def test_a_registry_key_and_an_import_path_mean_the_same(name: str) -> None:
    assert made(name, {"width": 4, "deep": True})["deep"] is True


@pytest.mark.usefixtures("module")
def test_an_attribute_of_an_attribute_is_found() -> None:
    assert made("own_parts:Net.Inner", {}) == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nett", ["model 'nett' is unknown; did you mean 'net'?", "Known: cnn, net", "package.module:attribute"]),
        ("transformer", ["model 'transformer' is unknown; Known: cnn, net"]),
        ("no_such_module:Net", ["no module named 'no_such_module'", "importable from the folder"]),
        ("own_parts:Nett", ["has no attribute 'Nett'", "check the spelling after the colon"]),
        ("own_parts:Net.Outer", ["has no attribute 'Outer'"]),
        ("own_parts:number", ["model 'own_parts:number' is a int, not a class or function"]),
        (":Net", ["model ':Net'", "ValueError"]),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_name_that_means_nothing_is_refused(name: str, words: list[str]) -> None:
    message = refused(name, {})
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('no licence')", ["its module raised RuntimeError: no licence", "raising.py, line 1"]),
        ("\nimport json\njson.no_such_thing", ["its module raised AttributeError", "raising.py, line 3"]),
        ("import no_such_package", ["no module named 'no_such_package'"]),
        ("def (", ["its module raised SyntaxError", "raising.py, line 1"]),
        ("raise SystemExit(0)", ["its module raised SystemExit: 0"]),
    ],
)
def test_a_module_that_fails_on_import_is_blamed_with_its_line(module: Write, text: str, words: list[str]) -> None:
    module("raising", text)
    message = refused("raising:Net", {})
    assert message.startswith("model 'raising:Net': ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("args", "problems"),
    [
        ({"width": 1, "widht": 2}, ["unknown argument 'widht'; did you mean 'width'? Allowed: width, rates, kind"]),
        ({"width": 1, "zzz": 2}, ["unknown argument 'zzz'; Allowed: width"]),
        ({}, ["argument 'width' is missing; add it under args"]),
        ({"width": "wide"}, ["argument 'width' is 'wide'; it must be a valid integer"]),
        ({"width": 1.5}, ["argument 'width' is 1.5; it must be a valid integer"]),
        ({"width": 1, "kind": "c"}, ["argument 'kind' is 'c'; it must be 'a' or 'b'"]),
        ({"width": 1, "deep": "on"}, ["argument 'deep' is 'on'; it must be a valid boolean"]),
        ({"width": 1, "rates": [0.1, "x"]}, ["argument 'rates' is [0.1, 'x']; it must be a valid number"]),
        ({"deep": 1, "zzz": 2}, ["argument 'deep' is 1", "unknown argument 'zzz'", "argument 'width' is missing"]),
    ],
)
@pytest.mark.usefixtures("module")
def test_every_wrong_argument_is_named(args: dict[str, Any], problems: list[str]) -> None:
    lines = refused("net", args).splitlines()
    assert len(lines) == len(problems)
    for problem in problems:
        assert any(line.startswith(f"model 'net': {problem}") for line in lines)


@pytest.mark.usefixtures("module")
def test_a_list_becomes_the_tuple_that_is_declared() -> None:
    assert made("net", {"width": 1, "rates": [0.1, 1]})["rates"] == (0.1, 1.0)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "args", "value"),
    [("net", {"width": "12"}, 12), ("Open", {"first": "12"}, "12"), ("Odd", {"size": "12"}, "12")],
)
def test_a_secret_becomes_what_the_signature_declares(name: str, args: dict[str, str], value: Any) -> None:
    name = name if name == "net" else f"own_parts:{name}"
    secrets = {key: Secret(text, "${env:X}") for key, text in args.items()}
    assert next(iter(made(name, secrets).values())) == value


@pytest.mark.usefixtures("module")
def test_a_secret_of_the_wrong_type_is_not_shown() -> None:
    message = refused("net", {"width": Secret("hunter2", "${env:X}")})
    assert "${env:X}" in message
    assert "hunter2" not in message


def opened(path: str) -> Any:
    raise FileNotFoundError(f"no file {path}/train.bin, nor hunter22")


def test_what_a_constructor_says_of_a_secret_shows_where_it_came_from() -> None:
    message = refused(f"{__name__}:opened", {"path": Secret("hunter2", "${env:X}")})
    assert "no file ${env:X}/train.bin, nor hunter22" in message


@pytest.mark.usefixtures("module")
def test_a_constructor_that_takes_anything_is_given_anything() -> None:
    assert made("cnn", {"first": 1, "other": 2}) == {"first": 1, "other": 2}


@pytest.mark.usefixtures("module")
def test_a_type_that_cannot_be_resolved_is_not_judged() -> None:
    assert made("own_parts:Odd", {"size": "any"}) == {"size": "any"}


@pytest.mark.usefixtures("module")
def test_a_positional_argument_cannot_be_given_again() -> None:
    assert made("net", {}, 7)["width"] == 7
    assert "unknown argument 'width'" in refused("net", {"width": 1}, 7)


def test_a_constructor_without_a_signature_is_refused() -> None:
    assert "wrap it in a function of your own" in refused("builtins:dict", {})


def test_a_constructor_that_raises_is_blamed_with_its_line(module: Write) -> None:
    line = OWN.splitlines().index('    raise OSError("no space left")') + 1
    message = refused("own_parts:broken", {"width": 2})
    assert "model 'own_parts:broken' with {'width': 2} raised OSError: no space left" in message
    assert f"own_parts.py, line {line}" in message


@pytest.mark.usefixtures("module")
def test_an_offer_is_used_only_where_it_is_named_and_not_given() -> None:
    offers = {"classes": 10, "vocab_size": 99}
    assert made("net", {"width": 1}, **offers)["classes"] == 10
    assert made("net", {"width": 1, "classes": 3}, **offers)["classes"] == 3
    assert "vocab_size" not in made("cnn", {"first": 1}, **offers)
    assert made("net", {}, width=5)["width"] == 5
