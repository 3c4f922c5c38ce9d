"""Seconds, CPU and memory to save a checkpoint to S3, beside s3fs moving the same bytes. `make bench`.

The server is a real one on this machine and shares its cores with both sides; only this process's CPU time is counted.
s3fs is given the bytes as objects of the same size, ready to be sent; ours copies them out of a state and checksums
them as well.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import torch

from tests.benchmarks.measure import Table, a_state, forget_peak, in_turns, memory_bytes
from tests.store.servers import S3Server, used
from toolkit import storage
from toolkit.checkpoint import Archive, Checkpointer, Policy
from toolkit.checkpoint.plan import FILE_BYTES
from toolkit.checkpoint.state import to_plain

SAVE, CPU, EXTRA_MIB = 0.8, 1.0, 256
DISK = Path("/var/tmp")


class Sides:
    """Both sides, with one state. Each turn returns the seconds it took; `cpu_s` is of each side's last turn."""

    def __init__(self, place: str, mib: int) -> None:
        self.place, self.state = place, a_state(mib)
        self.cpu_s = {"ours": 0.0, "s3fs": 0.0}
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in to_plain(self.state)[0].values()])
        self.bytes = flat.numel()
        self.pieces = [flat[at : at + FILE_BYTES].numpy().tobytes() for at in range(0, self.bytes, FILE_BYTES)]
        self.archive = Archive(f"{place}/ours", Policy(keep=1 << 30))
        self.s3fs = fsspec.filesystem("s3", use_listings_cache=False)

    def extra_mib(self) -> float:
        """Memory of a first save beyond state and its copy, at the most."""
        gc.collect()
        before = memory_bytes("VmRSS")
        forget_peak()
        self.ours = Checkpointer(self.archive)
        self.save_ours()
        return (memory_bytes("VmHWM") - before - self.bytes) / 2**20

    def save_ours(self) -> float:
        self.state.step += 1
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        self.ours.save(self.state)
        self.ours.wait()
        seconds, self.cpu_s["ours"] = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        assert not self.ours.failure, self.ours.failure
        storage.remove(self.archive.folder(self.state.step))
        return seconds

    def save_s3fs(self) -> float:
        places = {f"{self.place}/s3fs/{number}": piece for number, piece in enumerate(self.pieces)}
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        self.s3fs.pipe(places)
        seconds, self.cpu_s["s3fs"] = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        storage.remove(f"{self.place}/s3fs")
        return seconds


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=512)
    mib, table = parser.parse_args().mib, Table()
    with (
        tempfile.TemporaryDirectory(prefix="toolkit-bench-", dir=DISK) as folder,
        S3Server(folder) as server,
        used(server.environment),
    ):
        sides = Sides(server.fresh_url(), mib)
        table.at_most("s3: memory MiB beyond the state's", sides.extra_mib(), EXTRA_MIB, 1.0)
        sides.save_s3fs()
        took = in_turns(
            {
                "ours": sides.save_ours,
                "our CPU": lambda: sides.cpu_s["ours"],
                "s3fs": sides.save_s3fs,
                "its CPU": lambda: sides.cpu_s["s3fs"],
            }
        )
        table.at_least("s3: save s, s3fs", took["ours"], took["s3fs"], SAVE)
        table.at_most("s3: CPU s, s3fs", took["our CPU"], took["its CPU"], CPU)
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
