"""The flip campaign: the newest of two checkpoints is damaged in 500 ways, and each is found, named and passed over."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.states import all_of, save, small_state
from toolkit.checkpoint import Archive, Checkpointer
from toolkit.checkpoint.manifest import DamagedError

CASES = 500
OLD, NEW = "step-00000010", "step-00000020"
Damage = Callable[[Path, random.Random], set[str]]


def flip(folder: Path, chance: random.Random) -> set[str]:
    path = chance.choice(sorted((folder / NEW).iterdir()))
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return {path.name}


def truncate(folder: Path, chance: random.Random) -> set[str]:
    path = chance.choice(sorted((folder / NEW).iterdir()))
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return {path.name}


def lengthen(folder: Path, chance: random.Random) -> set[str]:
    path = chance.choice(sorted((folder / NEW).iterdir()))
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 9)))
    return {path.name}


def swap_within(folder: Path, chance: random.Random) -> set[str]:
    one, other = chance.sample(sorted((folder / NEW).iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return {one.name, other.name}


def swap_between(folder: Path, chance: random.Random) -> set[str]:
    """A file takes the place of the one of its kind in the other checkpoint: of the same size, but for the manifest."""
    number = chance.randrange(3)
    new, old = (sorted((folder / step).iterdir())[number] for step in (NEW, OLD))
    new.write_bytes(old.read_bytes())
    return {new.name}


def lose(folder: Path, chance: random.Random) -> set[str]:
    """A file goes. Without a manifest there is no checkpoint to be damaged, so it is one of the others."""
    path = chance.choice([path for path in sorted((folder / NEW).iterdir()) if path.name != "manifest.json"])
    path.unlink()
    return {path.name}


def empty_manifest(folder: Path, chance: random.Random) -> set[str]:
    (folder / NEW / "manifest.json").write_bytes(b"")
    return {"manifest.json"}


DAMAGES: list[tuple[Damage, int]] = [
    (flip, 300), (truncate, 60), (lengthen, 40), (swap_within, 30), (swap_between, 40), (lose, 29), (empty_manifest, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undamaged")
    for seed, step in ((1, 10), (2, 20)):
        save(str(folder), small_state(seed, step))
    return folder


def test_every_damage_is_found_and_named_none_is_loaded_and_the_one_before_is_taken(
    undamaged: Path, tmp_path: Path
) -> None:
    chance, older, tried = random.Random(0), all_of(small_state(1, 10)), 0
    for damage, times in DAMAGES:
        for case in range(times):
            folder, what = tmp_path / "checkpoints", f"{damage.__name__} {case}"
            shutil.copytree(undamaged, folder)
            names = damage(folder, chance)
            with pytest.raises(DamagedError):
                Archive(str(folder)).verify(20)
            said: list[str] = []
            state = small_state(3)
            assert Checkpointer(Archive(str(folder))).resume(state, said.append) == 10, what
            assert all_of(state) == older, what
            assert any(f"{NEW}/{name}" in said[0] for name in names), f"{what}: {said}"
            assert "put aside" in said[0]
            assert sorted(path.name for path in folder.iterdir()) == ["damaged", OLD], what
            assert [path.name for path in (folder / "damaged").iterdir()] == [NEW], what
            shutil.rmtree(folder)
            tried += 1
    assert tried == CASES
