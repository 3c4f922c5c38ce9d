"""A cluster profile is read in full or refused in full, with lines and the nearest names."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolkit.cluster.profile import load_profile
from toolkit.errors import JobError

GOOD = """
partition: main
gpus_per_node: 2
cpus_per_gpu: 8
mem_gb_per_gpu: 60.5
time_min: 240
env: {NCCL_DEBUG: WARN, OMP_NUM_THREADS: 4}
modules: [cuda/12.4]
setup: ["ulimit -l unlimited"]
container: {runtime: apptainer, mounts: [/data, "/a:/b"]}
shared: [/shared]
sbatch: {exclusive: true, comment: it's ours, nice: 10}
"""


def refused(folder: Path, text: str) -> str:
    (folder / "site.yaml").write_text(text)
    with pytest.raises(JobError) as caught:
        load_profile(str(folder / "site.yaml"))
    return str(caught.value)


def test_a_profile_is_read_in_full(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(GOOD)
    profile = load_profile(str(tmp_path / "site.yaml"))
    assert (profile.partition, profile.time_min, profile.signal_lead_s) == ("main", 240, 120)
    assert profile.env == {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "4"}
    assert (profile.cpus(2), profile.mem_gb(2), profile.cpus(0), profile.mem_gb(0)) == (16, 121.0, None, None)
    assert profile.container
    assert profile.container.mounts == ("/data", "/a:/b")


def test_an_empty_profile_leaves_all_to_slurm(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("# nothing yet\n")
    assert load_profile(str(tmp_path / "site.yaml")).partition is None


def test_all_mistakes_are_told_at_once_with_lines(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        'partition: main\ngpus_per_nod: 2\ntime_min: "60"\nenv: {1X: a}\nsbatch: {time: 5, no_requeue: true}\n'
        "container: {runtime: docker}\nmodules: [cuda; rm]\nscratch: here\n",
    )
    assert "cluster profile" in message
    assert "has 7 problems" in message
    for words in (
        "line 2: gpus_per_nod: is an unknown key; did you mean 'gpus_per_node'?",
        "line 3: time_min: '60' is not allowed; it must be a valid integer (minutes",
        "line 4: env: '1X' cannot be the name",
        "line 5: sbatch: is not for options that have a place of their own: no-requeue (toolkit sets it), time (use "
        "time_min)",
        "line 6: container.runtime: 'docker' is not allowed",
        "line 7: modules: 'cuda; rm' is no name of a module",
        "line 8: scratch: 'here' is not absolute",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "is not a mapping"),
        ("a: [", "line 1"),
        ("env: {X: true}\n", "line 1: env.X: True is not allowed; it must be a valid string"),
        ("learning_rate: 1\n", "Allowed: account, "),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text)


def test_a_missing_file_names_the_profiles_there_are(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("")
    (tmp_path / "small.yaml").write_text("")
    with pytest.raises(JobError) as caught:
        load_profile(str(tmp_path / "smal.yaml"))
    assert f"did you mean {tmp_path}/small.yaml? profiles there: {tmp_path}/big.yaml, " in str(caught.value)
    with pytest.raises(JobError, match="has no profiles"):
        load_profile(str(tmp_path / "none" / "x.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda path: path.name)
def test_the_profiles_that_come_with_it_are_right(path: Path) -> None:
    load_profile(str(path))
