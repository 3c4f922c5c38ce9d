"""The README's chapter on clusters is typed, in its order, on the testbed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import BED, ROOT, Cluster

CHAPTER = (ROOT / "README.md").read_text().partition("\n## On a cluster\n")[2].partition("\n## ")[0]
LINES = [
    shlex.split(re.sub(" +# .*", "", line))
    for text in re.findall(r"```sh\n(.*?)```", CHAPTER, re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines()
]
# Of the last block the testbed's own tests: here it is up, and others use it.
TYPED = [words for words in LINES if words[0] in ("toolkit", "sbatch") and "runs/broken" not in " ".join(words)]
RUNS = {"runs/digits_mlp": 3235, "runs/script": 3235} | {
    f"runs/sweep/lr={lr},seed={seed}": 162 for lr in ("0.001", "0.003") for seed in (0, 1)
}


@pytest.mark.campaign
def test_its_commands_work_as_typed(cluster: Cluster) -> None:
    (cluster.folder / "slurm").symlink_to(ROOT / "slurm")
    here = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    said = ""
    for program, *words in TYPED:
        command = [sys.executable, "-m", "toolkit"] if program == "toolkit" else [program]
        done = subprocess.run(
            [*command, *words],
            cwd=cluster.folder,
            env=os.environ | here,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"{program} {words}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert "digits_mlp: completed at step 3235 of 3235" in said, "logs --follow"
    assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3" in said
    assert "has ended already: it is completed" in said
    cluster.until(lambda: not cluster.jobs(), "the end of all jobs", timeout_s=200)
    ended = {path: json.loads((cluster.folder / path / "status.json").read_text()) for path in RUNS}
    assert {path: (status["state"], status["step"]) for path, status in ended.items()} == {
        path: ("completed", steps) for path, steps in RUNS.items()
    }


def test_the_faults_and_targets_it_names_exist() -> None:
    words = BED.read_text()
    for program, *rest in LINES:
        if program == "slurm/testbed/cluster":
            assert f"#   cluster {rest[0]} N" in words
        if program == "make":
            subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, timeout=60, check=True)


def test_its_words_on_faults_are_those_of_the_code() -> None:
    from toolkit.cluster.agent import FENCE_S
    from toolkit.cluster.step import SILENT_S

    assert f"{SILENT_S:.0f} s without a word of its agent" in CHAPTER
    assert f"without a word from it for {FENCE_S:.0f} s they end their ranks" in CHAPTER
