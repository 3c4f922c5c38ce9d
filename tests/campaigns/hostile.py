"""Checkpoints that somebody has made to do harm, tried one after another; tests/test_hostile.py starts this.

Every case changes the newest of two checkpoints, with checksums that fit. All that reads checkpoints is then let loose
on it. What must come of it: our own error, or nothing; quickly, in little memory, with nothing unpickled or executed,
and nothing read or written outside the folder. Prints a line of JSON for each case.
"""

import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.states import all_of, bits, save, small_state, tensors_of
from toolkit.checkpoint import Archive, Checkpointer, export
from toolkit.checkpoint.manifest import checksum
from toolkit.errors import JobError, RunError

ROOM_BYTES = 1 << 30  # of addresses, beyond what an interpreter with torch has
MANY = 1 << 16  # of what has to be read before it can be refused
DATA, STATE, MANIFEST = "data-1.1.0.0.bin", "state-1.1.json", "manifest.json"


class Bomb:
    """Unpickled, it writes a file outside."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {OUTSIDE}/executed",)


# -- writing a checkpoint that fits itself


class Folder:
    """The newest checkpoint, and how to rewrite it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def manifest(self) -> Any:
        return json.loads((self.path / MANIFEST).read_bytes())["manifest"]

    def write(self, manifest: Any) -> None:
        self.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))

    def write_text(self, text: str | bytes) -> None:
        body = b'"manifest":' + (text.encode(errors="surrogatepass") if isinstance(text, str) else text) + b"}\n"
        (self.path / MANIFEST).write_bytes(f'{{"xxh3_128":"{checksum(body)}",\n'.encode() + body)

    def change(self, *path: Any, to: Any) -> None:
        """Give one member of the manifest another value."""
        manifest = self.manifest()
        *above, last = path
        place = manifest
        for key in above:
            place = place[key]
        place[last] = to
        self.write(manifest)

    def replace(self, name: str, content: bytes) -> None:
        """Give a file other content, and the manifest its size and checksums."""
        (self.path / name).write_bytes(content)
        manifest = self.manifest()
        manifest["files"][name] = {"bytes": len(content), "xxh3_128": checksum(content)}
        for entry in manifest["tensors"].values():
            for chunk in entry["chunks"]:
                size = {"float32": 4}[entry["dtype"]]
                for start, stop in chunk["box"]:
                    size *= stop - start
                chunk["xxh3_128"] = checksum(content[chunk["offset"] : chunk["offset"] + size])
        self.write(manifest)

    def values(self, **changes: Any) -> None:
        self.replace(STATE, json.dumps(json.loads((self.path / STATE).read_bytes()) | changes).encode())

    def add(self, name: str, shape: Any, chunks: Any = (), dtype: str = "float32") -> None:
        self.change("tensors", name, to={"dtype": dtype, "shape": shape, "chunks": list(chunks)})


def chunk(box: Any, offset: int = 0, file: str = DATA) -> dict[str, Any]:
    return {"file": file, "offset": offset, "box": box, "xxh3_128": "0" * 32}


def renamed(name: str) -> Callable[[Folder], None]:
    """The file of data by another name, in all places."""

    def rename(folder: Folder) -> None:
        text = json.dumps(folder.manifest())
        folder.write(text.replace(f'"{DATA}"', json.dumps(name)))

    return rename


def swapped_for(name: str, make: Callable[[Path], None]) -> Callable[[Folder], None]:
    """Something else in the place of a file."""

    def swap(folder: Folder) -> None:
        (folder.path / name).rename(OUTSIDE / name)
        make(folder.path / name)

    return swap


def sparse(name: str, size: int) -> Callable[[Folder], None]:
    def enlarge(folder: Folder) -> None:
        with (folder.path / name).open("r+b") as file:
            file.truncate(size)

    return enlarge


def doubled(folder: Folder) -> None:
    """Every key twice, the first time with another value."""
    text = json.dumps(folder.manifest())
    folder.write(text.replace('"step":', '"step": 77, "step":').replace('"shape":', '"shape": [10e9], "shape":'))


def cases() -> Iterator[tuple[str, Callable[[Folder], None]]]:
    """(what it is, what makes it), for all that one value in one place does not make."""
    pickled = pickle.dumps(Bomb())
    yield "a pickle for data", lambda folder: folder.replace(DATA, pickled.ljust((folder.path / DATA).stat().st_size))
    yield "a pickle for the state", lambda folder: folder.replace(STATE, pickled)
    yield "a pickle for the manifest", lambda folder: (folder.path / MANIFEST).write_bytes(pickled) and None
    yield "a pickle in the manifest", lambda folder: folder.write_text(pickled)
    yield "torch.save for the state", lambda folder: torch.save(Bomb(), folder.path / STATE)
    for name in (
        "../../secret", "/etc/passwd", f"{OUTSIDE}/secret", "..", ".", "", f"{DATA}\n", f"{DATA}\0", "data-١.1.1.bin",
        f"{DATA}/../{DATA}", f"./{DATA}", "data-1.1.0.0.bin.bin", "data-" + "1" * 500 + ".1.bin", MANIFEST,
    ):  # fmt: skip
        yield f"the file name {name[:30]!r}", renamed(name)
        yield f"the state {name[:30]!r}", lambda folder, name=name: folder.change("state", to=name)
    yield "the data for a state", lambda folder: folder.change("state", to=DATA)
    yield "the state for data", renamed(STATE)
    for shape in (
        [10**15], [2**62] * 64, [1] * 65, [0] * 65, [1] * 10**6, [-1], [-2, -2], [1.0], ["1"], [True], [10**4000],
        [2**63], [[1]], 5, {"0": 1}, None,
    ):  # fmt: skip
        name = str(shape)[:30]
        yield f"a shape {name} without chunks", lambda folder, shape=shape: folder.add("optimizer/0.weight/x", shape)
        one = shape if isinstance(shape, list) else [shape]
        parts = [chunk([[0, size] for size in one])]
        yield (
            f"a shape {name} in a chunk",
            lambda folder, shape=shape, parts=parts: folder.add("optimizer/0.weight/x", shape, parts),
        )
    for shape in ([10**15, 0], [2**62, 0, 2**62], [0] * 64, [2**62] * 63 + [0]):
        yield f"nothing of a shape {shape[:3]}", lambda folder, shape=shape: folder.add("optimizer/0.weight/x", shape)
    yield "a tensor in another's bytes", lambda folder: folder.add("optimizer/0.weight/x", [2], [chunk([[0, 2]])])
    yield "a tensor far beyond", lambda folder: folder.add("optimizer/0.weight/x", [2], [chunk([[0, 2]], 2**62)])
    yield "one that ends before it begins", lambda folder: folder.add("optimizer/0.weight/x", [2], [chunk([[2, 0]])])
    overlapping = [chunk([[0, 2]]), chunk([[1, 3]], 8)]
    yield "chunks that overlap", lambda folder: folder.add("optimizer/0.weight/x", [3], overlapping)
    yield "an unknown type", lambda folder: folder.add("optimizer/0.weight/x", [0], dtype="object")
    yield "a type of a megabyte", lambda folder: folder.add("optimizer/0.weight/x", [0], dtype="x" * 2**20)
    yield "a name of a megabyte", lambda folder: folder.add("x" * 2**20, [0])
    yield "a strange name", lambda folder: folder.add("\x1b[2J\0\n[red]..", [3])
    yield "half a character", lambda folder: folder.write(json.dumps(folder.manifest()).replace("0.weight", "\\ud800"))
    yield "a manifest of a gigabyte", sparse(MANIFEST, 1 << 30)
    yield "data of a gigabyte", sparse(DATA, 1 << 30)
    yield "state of a gigabyte", sparse(STATE, 1 << 30)
    yield "data said to have a petabyte", lambda folder: folder.change("files", DATA, "bytes", to=10**15)
    yield "doubled keys", doubled
    yield (
        "not UTF-8",
        lambda folder: folder.write_text(json.dumps(folder.manifest()).encode().replace(b"weight", b"\xff")),
    )
    yield "UTF-16", lambda folder: folder.write_text(json.dumps(folder.manifest()).encode("utf-16"))
    yield "more behind it", lambda folder: folder.write(json.dumps(folder.manifest()) + "{}")
    yield "the parameter of another", lambda folder: folder.values(optimizer={"../x/y": 1, "y": 1, "": None})
    yield "one more value", lambda folder: folder.values(optimizer={"0.weight/__class__": "x", "0.weight/step": 5})
    yield "a tie to nothing", lambda folder: folder.values(tied={"0.weight": "nothing"})
    yield "ties in a circle", lambda folder: folder.values(tied={"a": "b", "b": "a"})
    for name in (DATA, STATE, MANIFEST):
        yield f"a link for {name}", swapped_for(name, lambda path: path.symlink_to(OUTSIDE / path.name))
        yield f"a link to nothing for {name}", swapped_for(name, lambda path: path.symlink_to(OUTSIDE / "nothing"))
        yield f"a link to itself for {name}", swapped_for(name, lambda path: path.symlink_to(path))
        yield f"a device for {name}", swapped_for(name, lambda path: path.symlink_to("/dev/zero"))
        yield f"a pipe for {name}", swapped_for(name, os.mkfifo)
        yield f"a folder for {name}", swapped_for(name, lambda path: path.mkdir())
    yield (
        "a link for the folder",
        lambda folder: shutil.move(folder.path, OUTSIDE / "step") and folder.path.symlink_to(OUTSIDE / "empty"),
    )
    yield "a file for the folder", lambda folder: shutil.rmtree(folder.path) or folder.path.write_bytes(b"")
    yield "a pipe for the folder", lambda folder: shutil.rmtree(folder.path) or os.mkfifo(folder.path)


def bombs() -> Iterator[tuple[str, Callable[[Folder], None]]]:
    """What takes long to read, or much room, in every place."""
    for name, text in {
        "deep": "[" * MANY + "]" * MANY,
        "deep objects": '{"a":' * MANY + "1" + "}" * MANY,
        "wide": "[" + "1," * MANY + "1]",
        "wide lists": "[" + "[]," * MANY + "1]", "wide objects": '{"a":{}' + ',"a":{}' * MANY + "}",
        "many keys": "{" + ",".join(f'"{number:x}":0' for number in range(MANY)) + "}",
        "a long number": "1" * MANY, "a long fraction": "0." + "1" * MANY, "an exponent": "1e999999999", "NaN": "NaN",
        "Infinity": "-Infinity", "no value": "", "half a text": '"abc',
    }.items():  # fmt: skip
        for place in ("score", "step", "versions", "files", "tensors", "unknown"):
            yield (
                f"{name} for {place}",
                lambda folder, text=text, place=place: folder.write(
                    json.dumps(folder.manifest() | {place: "@"}).replace('"@"', text)
                ),
            )
        for place in ("shape", "chunks", "box"):
            inner = {"shape": [0], "chunks": [], "dtype": "int8"} | (
                {"chunks": [{**chunk("@")}]} if place == "box" else {place: "@"}
            )
            yield (
                f"{name} for {place}",
                lambda folder, text=text, inner=inner: folder.write(
                    json.dumps(folder.manifest() | {"tensors": {"x": inner}}).replace('"@"', text)
                ),
            )
        for place in ("best", "scaler", "trained", "optimizer", "tied", "unknown"):
            yield (
                f"{name} for {place} in the state",
                lambda folder, text=text, place=place: folder.replace(
                    STATE,
                    json.dumps(json.loads((folder.path / STATE).read_bytes()) | {place: "@"})
                    .replace('"@"', text)
                    .encode(),
                ),
            )
        yield f"{name} for all of the manifest", lambda folder, text=text: folder.write(text or " ")
        yield f"{name} for all of the state", lambda folder, text=text: folder.replace(STATE, text.encode())
    chunks = ",".join(json.dumps(chunk([[0, 1], [at, at + 1]], at)) for at in range(20_000))
    slow = f'{{"dtype":"int8","shape":[1,20000],"chunks":[{chunks}]}}'
    yield (
        "many chunks side by side",
        lambda folder: folder.write(json.dumps(folder.manifest() | {"tensors": {"x": "@"}}).replace('"@"', slow)),
    )


EVIL: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**70, -(2**70), "", "x", "../x", "1", [], {}, [[]], [None], {"": None}, [[0, 1]], [-1],
    "@nan",
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of JSON."""
    if path:
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def one_value_cases(folder: Folder) -> Iterator[tuple[str, Callable[[Folder], None]]]:
    """Every value of manifest and state in turn replaced by each of EVIL, or left out."""

    def changed(tree: Any, path: tuple[Any, ...], value: Any) -> str:
        tree = place = json.loads(json.dumps(tree))
        for key in path[:-1]:
            place = place[key]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return json.dumps(tree).replace('"@nan"', "NaN")

    manifest, state = folder.manifest(), json.loads((folder.path / STATE).read_bytes())
    for value in (*EVIL, KeyError):
        for path in places(manifest):
            yield f"manifest {path}: {value}", lambda f, p=path, v=value: f.write(changed(manifest, p, v))
        for path in places(state):
            yield f"state {path}: {value}", lambda f, p=path, v=value: f.replace(STATE, changed(state, p, v).encode())


# -- what must not happen


FORBIDDEN = (
    "compile", "ctypes.", "exec", "import", "marshal.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
    "pickle.", "socket.", "subprocess.",
)  # fmt: skip


class Watch:
    """Writes down what the interpreter does, from an audit hook, which nothing can take off again."""

    def __init__(self, root: Path) -> None:
        self.root, self.crimes, self.on = os.path.realpath(root), list[str](), False
        sys.addaudithook(self.see)

    def see(self, event: str, args: Any) -> None:
        if not self.on:
            return
        try:
            if event.startswith(FORBIDDEN):
                self.crimes.append(f"{event} {str(args)[:200]}")
            elif event == "open" and isinstance(args[0], str | bytes):
                self._inside(event, os.path.realpath(os.fsdecode(args[0])))
            elif event.startswith(("os.", "shutil.")):
                for path in args[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
                    if isinstance(path, str | bytes):
                        above, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                        self._inside(event, os.path.join(os.path.realpath(above), name))
        except Exception as error:
            self.crimes.append(f"{event}: {error!r}")

    def _inside(self, event: str, path: str) -> None:
        if not path.startswith(self.root + os.sep) and path != self.root:
            self.crimes.append(f"{event} {path}")


def attempts(url: str, all_: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that reads checkpoints, or what reads most of them."""
    archive = Archive(url)
    yield "verify", lambda: archive.verify(2)
    if all_:
        yield "steps", archive.steps
        yield "next_attempt", archive.next_attempt
        yield "find", lambda: archive.find("last")
        yield "load", lambda: archive.load(2, small_state(8))
        yield "export", lambda: export.export(archive, 2, f"{url}/out.safetensors")
        yield "fit", lambda: export.fit(f"{url}/step-00000002", small_state(8).model).load(small_state(8).model)


def memory(what: str) -> int:
    """Bytes of this process: VmSize of addresses, VmRSS in memory now, VmHWM at most since `start_over`."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


def start_over() -> int:
    """Begin to measure anew. Returns what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def tried(url: str, watch: Watch, all_: bool = True) -> dict[str, Any]:
    """What comes of it."""
    found: dict[str, Any] = {"wrong": [], "said": ""}
    before, started_s = start_over(), time.monotonic()
    watch.crimes, watch.on = [], True
    for name, attempt in attempts(url, all_):
        try:
            attempt()
        except (RunError, JobError) as error:
            found["said"] = max(found["said"], str(error), key=len)
        except BaseException as error:
            found["wrong"].append(f"{name} raised {error!r}"[:500])
    state, said = small_state(9), []
    try:
        step = Checkpointer(Archive(url)).resume(state, said.append)
        if step != 2 and all_of(state) != all_of(small_state(1, step=1)):
            found["wrong"].append(f"resume has loaded {step}")
    except RunError as error:
        step = str(error)[:300]
    except BaseException as error:
        step = None
        found["wrong"].append(f"resume raised {error!r}"[:500])
    watch.on = False
    found |= {"took_s": time.monotonic() - started_s, "bytes": memory("VmHWM") - before}
    found |= {"resumed": step, "same": bits(tensors_of(state)) == ORIGINAL}
    found["wrong"] += [f"did {crime}" for crime in watch.crimes]
    found["wrong"] += ["said too much"] * (len(found["said"]) > 5000 or any(len(words) > 5000 for words in said))
    return found


def main(root: Path) -> None:
    for step in (1, 2):
        save(str(root / "template"), small_state(step, step=step), attempt=1)
    folder, watch = root / "checkpoints", Watch(root)
    shutil.copytree(root / "template", folder)
    warm = tried(str(folder), watch)  # imports what is imported late
    assert (warm["resumed"], warm["same"]) == (2, True), warm
    room = memory("VmSize") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    template = Folder(root / "template" / "step-00000002")
    values = random.Random(0).sample(list(one_value_cases(template)), 400)
    for kind, found in (("case", cases()), ("bomb", bombs()), ("value", values)):
        for name, make in found:
            shutil.rmtree(folder)
            shutil.copytree(root / "template", folder)
            shutil.rmtree(OUTSIDE, ignore_errors=True)
            (OUTSIDE / "empty").mkdir(parents=True)
            (OUTSIDE / "secret").write_text("secret")
            (OUTSIDE / "empty" / "mine").write_text("mine")
            make(Folder(folder / "step-00000002"))
            before = {path: path.read_bytes() for path in OUTSIDE.rglob("*") if path.is_file()}
            outcome = tried(str(folder), watch, all_=kind == "case")
            after = {path: path.read_bytes() for path in OUTSIDE.rglob("*") if path.is_file()}
            if before != after:
                outcome["wrong"].append("something outside has changed")
            print(json.dumps({"kind": kind, "name": name} | outcome), flush=True)


if __name__ == "__main__":
    ROOT = Path(sys.argv[1])
    OUTSIDE = ROOT.parent / f"{ROOT.name}-outside"
    ORIGINAL = bits(tensors_of(small_state(2, step=2)))
    ROOT.mkdir()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    main(ROOT)
