"""Every job file of the project runs: a few steps of each, on data that are here or made to look like the real ones."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, Workplace
from tests.test_datasets import put_mnist

JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("name", JOBS)
def test_a_few_steps_of_every_job(name: str, workplace: Workplace) -> None:
    changes = ["train.max_steps=3", "log.every_steps=1", "data.global_batch_size=8", "run.dir=run"]
    if name == "fashion_cnn.yaml":
        root = put_mnist(str(workplace.folder / "idx"), stem="train")
        put_mnist(root, stem="t10k")
        changes += [f"data.train.args.root={root}", f"data.test.args.root={root}"]
    workplace.run("train", f"jobs/{name}", *changes)
    assert workplace.status("run")["state"] == "completed"
    assert [line["step"] for line in workplace.metrics("run")] == [1, 2, 3]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_file_is_short_and_says_what_it_is(name: str) -> None:
    lines = Path(ROOT, "jobs", name).read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")
