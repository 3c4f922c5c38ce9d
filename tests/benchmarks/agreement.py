"""What it costs two ranks to agree after every step of 2 ms, and how soon a wish of one is known to both. `make bench`.

The cost is the CPU time inside `Agreement.reached` as a share of that of the whole loop, on real gloo ranks whose step
is arithmetic and a reduction. The reaction is the time from a wish of rank 1, at a random moment, until both know.
"""

import json
import os
import random
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from toolkit.agreement import Agreement
from toolkit.distributed import Ranks, ranks_from

STEP_S, COST_S, TRIALS = 2e-3, 8.0, 10
COST_BOUND, REACTION_BOUND_S = 0.005, 1.0


def main() -> int:
    if "RANK" in os.environ:
        _as_rank()
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    cost, step_s = (max(one[name] for one in told) for name in ("cost", "step_s"))
    reaction_s = max(one["reaction_s"] for one in told)
    missed = (cost > COST_BOUND) + (reaction_s > REACTION_BOUND_S)
    print(f"a step takes {step_s * 1e3:.2f} ms on the slower of {len(told)} ranks")
    print(f"agreement costs {cost:.2%} of its CPU time, at most {COST_BOUND:.1%}{'  MISSED' * (cost > COST_BOUND)}")
    late = "  MISSED" * (reaction_s > REACTION_BOUND_S)
    print(
        f"a wish is known after at most {reaction_s:.3f} s in {TRIALS} trials, at most {REACTION_BOUND_S:.0f} s{late}"
    )
    return int(missed > 0)


class Work:
    """A step of about STEP_S: as much arithmetic as that takes on this machine, and a reduction."""

    def __init__(self) -> None:
        self.matrix, self.gradient = torch.rand(64, 64), torch.rand(4096)
        start_s = time.monotonic()
        for _ in range(2000):
            self.matrix @ self.matrix
        products = STEP_S / ((time.monotonic() - start_s) / 2000) * 0.85
        counts = torch.tensor([int(products)])
        dist.all_reduce(counts, dist.ReduceOp.MIN)
        self.products = int(counts)

    def step(self) -> None:
        for _ in range(self.products):
            self.matrix @ self.matrix
        dist.all_reduce(self.gradient)


def _as_rank() -> None:
    torch.set_num_threads(1)
    ranks = ranks_from(os.environ)
    dist.init_process_group("gloo")
    work = Work()
    cost, step_s = _cost(Agreement(ranks, {"stop": lambda: False}), work)
    reactions = [_reaction_s(ranks, work, random.Random(trial)) for trial in range(TRIALS)]
    told = {"cost": cost, "step_s": step_s, "reaction_s": max(reactions)}
    os.write(1, (json.dumps(told) + "\n").encode())  # in one piece, for two ranks share the pipe
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts while it is torn down, and the figure is already out


def _cost(agreement: Agreement, work: Work) -> tuple[float, float]:
    """(CPU time inside the agreement as a share of all, seconds a step)."""
    steps = int(COST_S / STEP_S)
    inside_s, begun_s, start_s = 0.0, time.process_time(), time.monotonic()
    for _ in range(steps):
        work.step()
        before_s = time.process_time()
        agreement.reached()
        inside_s += time.process_time() - before_s
    return inside_s / (time.process_time() - begun_s), (time.monotonic() - start_s) / steps


def _reaction_s(ranks: Ranks, work: Work, draw: random.Random) -> float:
    """Seconds from a wish of rank 1 until this rank knows."""
    wished_s = torch.tensor([time.monotonic() + 0.5 + draw.random()], dtype=torch.float64)
    dist.broadcast(wished_s, 0)  # all processes of a machine share its monotonic clock
    agreement = Agreement(ranks, {"stop": lambda: not ranks.leads and time.monotonic() >= float(wished_s)})
    while not agreement.reached():
        work.step()
    return time.monotonic() - float(wished_s)


if __name__ == "__main__":
    sys.exit(main())
