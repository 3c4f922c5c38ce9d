"""What the design promises of the code itself: where imports point, one door to each library, how long the path is."""

import ast
import inspect
import subprocess
import sys
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import toolkit
from tests.conftest import DIGITS, ROOT

PACKAGE = ROOT / "toolkit"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import those after the colon, and itself. Whoever wants more must change the design first.
LEAVES = {"errors", "randomness", "secret", "pulse", "process", "patterns", "console"}
MAY_IMPORT = {
    "errors": set(),
    "patterns": {"errors"},
    "randomness": set(),
    "secret": set(),
    "pulse": set(),
    "signals": {"errors"},
    "storage": LEAVES,
    "config": LEAVES,
    "components": LEAVES,
    "distributed": LEAVES,
    "agreement": LEAVES | {"distributed"},
    "sharding": LEAVES | {"distributed"},
    "layout": LEAVES,
    "models": LEAVES,
    "tasks": LEAVES,
    "optim": LEAVES | {"components"},
    "datasets": LEAVES | {"components", "storage"},
    "lock": LEAVES | {"storage"},
    "journal": LEAVES | {"storage"},
    "provenance": LEAVES,
    "world": LEAVES | {"distributed", "drift", "provenance"},
    "drift": set(),
    "run": LEAVES | {"storage", "lock", "journal", "provenance", "drift"},
    "checkpoint": LEAVES | {"storage", "distributed"},
    "lost": LEAVES | {"distributed"},
    "trainer": LEAVES | {"distributed", "agreement", "lost"},
    "observers": LEAVES | {"storage", "run", "checkpoint", "distributed"},
    "diagnosis": LEAVES | {"datasets", "lost", "trainer", "deaths", "oom"},
    "persistence": LEAVES
    | {"storage", "config", "drift", "run", "distributed", "optim", "checkpoint", "lost", "trainer", "observers"},
    "inspection": LEAVES | {"storage", "config", "run", "lock", "checkpoint", "persistence"},
    "fork": LEAVES | {"storage", "config", "drift", "run", "checkpoint", "persistence"},
    "proof": LEAVES | {"storage", "config", "run", "checkpoint"},
    "process": set(),
    "console": set(),
    "rank": LEAVES | {"signals"},
    "attempt": LEAVES,
    "stacks": LEAVES | {"attempt", "rank"},
    "node": LEAVES | {"attempt", "rank", "stacks", "oom", "signals"},
    "logs": LEAVES | {"storage", "run"},
    "oom": LEAVES,
    "deaths": LEAVES,
    "watchdog": LEAVES | {"attempt", "stacks"},
    "postmortem": LEAVES | {"storage", "run", "oom", "deaths"},
    "screening": LEAVES | {"components", "config", "datasets", "models", "optim", "tasks"},
    "evaluation": LEAVES | {"storage", "config", "distributed", "persistence", "session"},
    "results": LEAVES | {"storage", "config", "run", "distributed", "datasets", "checkpoint", "persistence", "session"},
    "notebook": LEAVES | {"config", "results"},
    "submission": LEAVES | {"config", "results", "cluster", "screening"},
    "ending": LEAVES | {"storage", "distributed", "run", "signals", "postmortem", "trainer"},
    "supervisor": LEAVES
    | {"run", "lock", "storage", "config", "signals", "attempt", "node", "stacks", "logs"}
    | {"watchdog", "postmortem", "verdict", "standing"},
    "standing": LEAVES | {"storage", "config", "run"},
    "verdict": LEAVES | {"attempt", "watchdog", "stacks", "postmortem", "deaths"},
    "cluster": LEAVES
    | {"storage", "config", "run", "lock", "provenance", "signals"}
    | {"attempt", "node", "postmortem", "supervisor", "standing", "logs"},
}
ROOTS = {"session", "cli", "commands", "__init__", "__main__"}
DOORS = {
    "yaml": {"config"},
    "fsspec": {"storage"},
    "submitit": {"cluster"},
    "safetensors": {"checkpoint"},
    "typer": {"cli", "commands"},
    "PIL": {"datasets"},
    "pyarrow": {"datasets"},
}
READS_ENVIRONMENT = {"cli", "commands", "config", "notebook", "results", "submission", "world", "cluster"}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it, as full dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = _part(path)
    if part in ROOTS:
        return
    own = {name.split(".")[1] for name in _imports(path) if name.startswith("toolkit.")}
    assert own <= MAY_IMPORT[part] | {part}, f"{path.name} imports {own - MAY_IMPORT[part]}"


@pytest.mark.parametrize("library", DOORS)
def test_each_outside_library_has_one_door(library: str) -> None:
    users = {_part(path) for path in MODULES if any(name.split(".")[0] == library for name in _imports(path))}
    assert users <= DOORS[library]


def test_the_environment_is_read_in_few_places() -> None:
    users = {_part(path) for path in MODULES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert users <= READS_ENVIRONMENT


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        names = _imports(path)
        assert not [name for name in names if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib")], path
        assert "torch.load(" not in path.read_text(), path
        assert "allow_pickle" not in path.read_text(), path


def test_public_names_can_be_imported_and_no_module_has_the_name_of_one() -> None:
    for name in toolkit.__all__:
        assert getattr(toolkit, name) is not None
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert not modules & {"train", "launch", "submit"}


def test_importing_the_package_imports_no_torch() -> None:
    names = "toolkit.Run, toolkit.launch, toolkit.submit, toolkit.load_job"
    code = f"import sys, toolkit.cli, toolkit.supervisor; {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_start_imports_no_compiler() -> None:
    code = "import sys, toolkit.session; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_bare_pytest_runs_every_test_file(pytestconfig: pytest.Config) -> None:
    ignored = pytestconfig.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert "dist" in folders
    assert not [name for name in folders for pattern in ignored if fnmatch(name, pattern)]


# From the command line to loss.backward(), in reading order; the set-up of job and ranks is part of it.
PATH = """
cli.main cli._run cli.train config.load.load_job config.load.job_from_text cli._ranks_to_start cli._train_as_rank
distributed.ranks_from session.train distributed.choose_device distributed.join session.build session._trainer
trainer.Trainer.__init__ distributed.wrap session._rehearse session._trained trainer.Trainer.fit trainer.Trainer.step
trainer.Trainer.backward distributed.without_sync
""".split()
MAX_LINES, MAX_FILES = 300, 5


def _lines_of_code(code: object) -> int:
    """Lines of a function that are neither blank nor its docstring."""
    source = textwrap.dedent("".join(inspect.getsourcelines(code)[0]))  # type: ignore[arg-type]
    function = ast.parse(source).body[0]
    docstring = ast.get_docstring(function, clean=False) or ""  # type: ignore[arg-type]
    lines = [line for line in source.splitlines() if line.strip()]
    return len(lines) - len([line for line in docstring.splitlines() if line.strip()]) - docstring.endswith("    ")


class _Arrived(BaseException):
    """Thrown by the second backward: the first is the rehearsal's."""


def test_the_path_from_the_command_to_backward_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: dict[str, object] = {}
    stack: list[str] = []
    backward = torch.Tensor.backward

    def name_of(code: object) -> str:
        module = Path(code.co_filename).relative_to(PACKAGE).with_suffix("")  # type: ignore[attr-defined]
        return ".".join([*module.parts, code.co_qualname])  # type: ignore[attr-defined]

    def watch(frame: object, event: str, argument: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and "<" not in code.co_qualname:
            called[name_of(code)] = code

    def arrived(tensor: torch.Tensor, *arguments: object, **options: object) -> None:
        if "trainer.Trainer.step" not in called:
            return backward(tensor, *arguments, **options)
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename.startswith(str(PACKAGE)):
                stack.append(name_of(frame.f_code))
            frame = frame.f_back
        raise _Arrived

    (tmp_path / "digits.yaml").write_text(DIGITS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toolkit", "train", "digits.yaml"])
    monkeypatch.setattr(torch.Tensor, "backward", arrived)
    from toolkit.cli import main

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with pytest.raises(_Arrived):
            main()
    finally:
        sys.setprofile(before)

    assert stack, "no backward was reached"
    assert set(stack) <= set(PATH), f"on the way, but not in the list: {set(stack) - set(PATH)}"
    assert set(PATH) <= called.keys(), f"in the list, but never called: {set(PATH) - called.keys()}"
    lines = {name: _lines_of_code(called[name]) for name in PATH}
    files = {name.rsplit(".", 2)[0] if "Trainer" in name else name.rpartition(".")[0] for name in PATH}
    with capsys.disabled():
        print(f"\n  path: {sum(lines.values())} lines in {len(files)} files")
    assert sum(lines.values()) <= MAX_LINES, lines
    assert len(files) <= MAX_FILES, files
