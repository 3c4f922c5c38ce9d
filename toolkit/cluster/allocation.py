"""The nodes that Slurm has given, and which of them are fit for another start."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import Signals

from toolkit.cluster import slurm
from toolkit.cluster.memory import Memory
from toolkit.cluster.plan import Plan
from toolkit.cluster.step import Step
from toolkit.console import say
from toolkit.postmortem import Failure
from toolkit.supervisor import Consequence

TWICE = 2
ALIVE_S = 15.0  # within which a node must run `true`
AWAY_S = 300.0  # how long slurmctld may be away


class Allocation:
    """A `supervisor.Place`: every attempt is over the fit ones of these nodes. `warned` is told of signals that the
    scheduler has sent to nodes, and `paths` must be there on each.
    """

    def __init__(
        self,
        plan: Plan,
        job_id: str,
        memory: Memory,
        environment: Mapping[str, str],
        paths: list[str],
        warned: Callable[[Signals], None],
    ) -> None:
        self.plan, self.job_id, self.memory = plan, job_id, memory
        self.environment, self.paths, self.warned = dict(environment), paths, warned
        self.hosts = self.given = slurm.expand(environment["SLURM_JOB_NODELIST"])
        self.unfit = {host for host in self.hosts if memory.failures.get(host, 0) >= TWICE}
        self.short = False  # whether too few nodes are left
        if len(self.fit()) < plan.nodes.least:
            self.unfit.clear()  # Slurm has no others for us, it seems

    def fit(self) -> list[str]:
        """The nodes for the next start."""
        return [host for host in self.hosts if host not in self.unfit][: self.plan.nodes.most]

    def attempt(self, folder: Path) -> Step:
        self._forget_lost()
        hosts, environment = self.fit(), self.environment
        ranks, nodes = self.plan.processes, ", ".join(hosts)
        say(f"starting {ranks} rank{'s' * (ranks > 1)} on each of these nodes: {nodes}")
        return Step(
            folder,
            self.plan.srun(hosts, self.paths, os.getcwd(), environment),
            hosts,
            self.plan.processes,
            self.paths,
            patience_s=self.plan.job.launch.limits.start_s,
            warned=self.warned,
            cancel=partial(_cancel_step, environment["SLURM_JOB_ID"]),
            additions=self.plan.additions,
            image=self.plan.image,
        )

    def after(self, failure: Failure, saved_step: int | None) -> Consequence:
        """Leave out nodes that are dead or have failed twice; but what fails on one node after another is the job's."""
        host, before = failure.host, set(self.unfit)
        self._forget_lost()
        hosts = [one for one in failure.lost or (host,) if failure.blames_host and one in self.given]
        dead = self._dead(hosts) if failure.rank is None else set()
        what = f"{failure.kind} at step {failure.pulse.step}"
        if hosts and not failure.lost and (other := self.memory.elsewhere(what, saved_step, host)):
            self.short = False
            return Consequence(
                f"the same failure has come on node {other} and now on {host}, with no new checkpoint since: it is "
                "the job's own"
            )
        for one in hosts:
            count = self.memory.failed(one)
            if one in dead:
                self._leave_out(one, "it does not answer")
            elif count >= TWICE:
                self._leave_out(one, f"it has failed {count} times in this run")
        left = len(self.fit())
        self.short = left < self.plan.nodes.least
        ends = f"{left} of at least {self.plan.nodes.least} nodes are left here" if self.short else ""
        return Consequence(ends, mended=self.unfit != before)

    def _leave_out(self, host: str, why: str) -> None:
        self.unfit.add(host)
        say(f"node {host} is left out from now on: {why}")

    def _forget_lost(self) -> None:
        """Slurm takes nodes that are down from a job, which --no-kill lets live. Waits while slurmctld is away: nothing
        can be started without it.
        """
        with suppress(slurm.SlurmError):
            facts = slurm.job_facts(self.job_id, patience_s=AWAY_S)
            if facts and set(facts.nodes) & set(self.hosts):
                self.hosts = [host for host in self.hosts if host in facts.nodes]

    def _dead(self, hosts: Sequence[str]) -> set[str]:
        """Those of some nodes that cannot even run `true`."""
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return {host for host, alive in zip(hosts, pool.map(self._alive, hosts), strict=True) if not alive}

    def _alive(self, host: str) -> bool:
        words = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--mem=0", "true"]
        try:
            slurm.ask(*words, timeout_s=ALIVE_S)
        except slurm.SlurmError:
            return False
        return True


def _cancel_step(number: str, step: str) -> None:
    with suppress(slurm.SlurmError):
        slurm.ask("scancel", f"{number}.{step}", timeout_s=5)
