"""Commands on data."""

import os

from toolkit.commands.options import Debug, JobFile, Overrides
from toolkit.config import Component, load_job


def fetch(job: JobFile, overrides: Overrides = None, debug: Debug = False) -> None:
    """Download and verify a job's data, where there is a network; training then finds them."""
    from toolkit import datasets, screening, storage

    config = load_job(job, overrides or (), os.environ)
    screening.screen(config)
    data = config.data
    sets = {"data.train": data.train, "data.val": data.val, "data.test": data.test}
    named = {key: one for key, one in sets.items() if isinstance(one, Component)}
    for file in dict.fromkeys(file for key, one in named.items() for file in datasets.downloads(key, one)):
        print(f"{storage.shown(file.url)}: {file.ensure()}, {file.path.stat().st_size} bytes in {file.path}")
    train = None
    for key, one in named.items():
        dataset = datasets.build(key, one, train)
        train = dataset if train is None else train
        print(f"{key}: {len(dataset)} samples of {one.name}")
