"""Which samples each step really took: `log.samples: true`. For proofs, not for every day."""

import json
import tempfile
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from toolkit import storage
from toolkit.run import Run


def recorded(steps: Iterable[Sequence[Any]], run: Run, attempt: int, trainer: Any) -> Generator[Sequence[Any]]:
    """The same steps. Before each is taken, its samples' numbers are a line of logs/samples-ATTEMPT-RANK.jsonl.

    After a rollback a step comes again, and its last line counts. Of a remote run the file is written at the end.
    """
    name = f"samples-{attempt}-{trainer.ranks.rank}.jsonl"
    url = run.at("logs", name)
    with tempfile.TemporaryDirectory(prefix="toolkit-samples-") as spool:
        path = Path(storage.local_path(url) or Path(spool) / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if storage.local_path(url) is None and storage.exists(url):
            path.write_bytes(storage.read(url))
        try:
            with open(path, "a", encoding="ascii", buffering=1) as file:  # a line at a time: a kill may come
                for micro_batches in steps:
                    indices = [int(index) for batch in micro_batches for index in batch.indices]
                    file.write(json.dumps({"step": trainer.state.step, "samples": indices}) + "\n")
                    yield micro_batches
        finally:
            if storage.local_path(url) is None:
                storage.write(url, path.read_bytes())
