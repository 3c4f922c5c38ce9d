"""A hostile checkpoint does nothing but raise our error: pickles, paths out of the folder, bombs, links, sizes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
HANG_S = 60.0  # a reader that takes so long for one of these small checkpoints can be held up for ever
MEMORY_BYTES = 1 << 30  # what makes a reader ask for more can have all there is
CASES = {"case": 113, "bomb": 222, "value": 400}  # at least so many of each kind


def test_a_hostile_checkpoint_does_nothing_but_raise_our_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.hostile", str(tmp_path / "root")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    tried = Counter(outcome["kind"] for outcome in outcomes)
    assert all(tried[kind] >= least for kind, least in CASES.items()), tried
    for outcome in outcomes:
        assert not outcome["wrong"], outcome
        assert outcome["took_s"] < HANG_S, outcome
        assert outcome["bytes"] < MEMORY_BYTES, outcome
        assert outcome["resumed"] is not None, outcome
