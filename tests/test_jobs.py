"""Every job file of the project runs: a few steps of each, on data that are here or made to look like the real ones.
Those that promise to learn something do.
"""

from pathlib import Path

import pytest

from tests.campaigns import starts
from tests.conftest import ROOT, Workplace
from tests.test_datasets import put_mnist

JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    starts.warm()


@pytest.fixture
def workplace(workplace: Workplace) -> Workplace:
    """One whose commands start in a tenth of the time."""
    return starts.Forked(workplace.folder)


def synthetic(which: str, **args: object) -> str:
    said = ", ".join(f"{name}: {value}" for name, value in args.items())
    return f"data.{which}={{name: synthetic, args: {{{said}}}}}"


# What makes a job small, and its data those of this machine.
SMALL = {
    "cifar_resnet.yaml": [
        *(synthetic(which, shape=[3, 32, 32], size=64) for which in ("train", "test")),
        "model.args.width=8",
    ],
    "gpt2_124m.yaml": [
        *(synthetic(which, kind="tokens", vocab_size=50257, context=16, size=32) for which in ("train", "val")),
        "model.args.layers=2",
        "model.args.width=48",
        "train.compile=false",
    ],
    "imagenet_resnet50.yaml": [
        *(synthetic(which, shape=[3, 64, 64], size=64) for which in ("train", "val")),
        "model.args.width=8",
        "data.workers=1",
    ],
}


@pytest.mark.parametrize("name", JOBS)
def test_a_few_steps_of_every_job(name: str, workplace: Workplace) -> None:
    changes = ["train.max_steps=3", "log.every_steps=1", "data.global_batch_size=8", "run.dir=run"]
    if name == "fashion_cnn.yaml":
        root = put_mnist(str(workplace.folder / "idx"), stem="train")
        put_mnist(root, stem="t10k")
        changes += [f"data.train.args.root={root}", f"data.test.args.root={root}"]
    if name == "finetune_cnn.yaml":
        workplace.run("train", "jobs/digits_cnn.yaml", "train.max_steps=1")
    workplace.run("train", f"jobs/{name}", *changes, *SMALL.get(name, []))
    assert workplace.status("run")["state"] == "completed"
    assert [line["step"] for line in workplace.metrics("run")] == [1, 2, 3]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_file_is_short_and_says_what_it_is(name: str) -> None:
    lines = Path(ROOT, "jobs", name).read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")


def test_a_new_head_on_a_trained_network_beats_a_network_from_scratch_after_as_many_steps(workplace: Workplace) -> None:
    workplace.run("train", "jobs/digits_cnn.yaml", "train.epochs=12")
    tune = ["train", "jobs/finetune_cnn.yaml"]
    said = workplace.run(*tune, "run.dir=runs/tuned")
    assert "24 tensors taken\n  begin anew: layers.17.bias, layers.17.weight\n" in said
    scratch = ["run.init_from=null", "run.init_except=[]", "train.freeze=[]", "optimizer.lr_scale={}"]
    workplace.run(*tune, *scratch, "optimizer.args.lr=1e-2", "run.dir=runs/scratch")
    tuned, other = (workplace.metrics(f"runs/{name}")[-1] for name in ("tuned", "scratch"))
    assert tuned["step"] == other["step"] == 30
    assert tuned["test/accuracy"] > 0.95
    assert 1 - tuned["test/accuracy"] < 0.5 * (1 - other["test/accuracy"])
    assert tuned["test/loss"] < 0.5 * other["test/loss"]


def test_a_small_resnet_learns_512_images_to_the_last(workplace: Workplace) -> None:
    images = {"shape": [3, 16, 16], "size": 512}
    changes = [
        synthetic("train", **images), synthetic("val", **images), "data.test=null", "data.transforms=[]",
        "data.workers=0", "data.global_batch_size=32", "model.args.width=8", "schedule.args.warmup_steps=5",
        "train.epochs=6",
    ]  # fmt: skip
    workplace.run("train", "jobs/cifar_resnet.yaml", *changes, "run.dir=run")
    assert workplace.metrics("run")[-1]["val/accuracy"] == 1.0
