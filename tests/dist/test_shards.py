"""What FSDP2 has sharded over some ranks is read by any other number of them, sharded or not; and the reverse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.conftest import ROOT, TORCHRUN

SCRIPT = Path(__file__).with_name("shards.py")


def run(ranks: int, *words: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, "--nproc-per-node", str(ranks), SCRIPT, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("writers", "strategy", "readers"),
    [
        (4, "fsdp", [(2, "fsdp"), (3, "plain"), (1, "plain")]),
        (2, "plain", [(3, "fsdp")]),
    ],
    ids=["sharded over 4", "whole on 2"],
)
def test_a_checkpoint_is_read_by_any_number_of_ranks_sharded_or_not(
    tmp_path: Path, writers: int, strategy: str, readers: list[tuple[int, str]]
) -> None:
    found = run(writers, "write", strategy, str(tmp_path))
    assert found == {"tensors": 48, "writers": writers}
    for ranks, other in readers:
        assert run(ranks, "read", other, str(tmp_path)) == found
