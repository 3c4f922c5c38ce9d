"""The nodes that Slurm has given, and which of them are fit for another start."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from toolkit import storage
from toolkit.cluster import slurm
from toolkit.cluster.plan import Plan
from toolkit.cluster.step import Step
from toolkit.postmortem import Failure
from toolkit.run import Run

TWICE = 2
ALIVE_S = 15.0  # within which a node must run `true`


class Allocation:
    """A `supervisor.Place`: every attempt is over the fit ones of these nodes.

    Which node failed how often is kept in the run (nodes.json), for a requeued job may get it again.
    """

    def __init__(
        self,
        plan: Plan,
        job_id: str,
        hosts: list[str],
        environment: Mapping[str, str],
        paths: list[str],
        warned: Callable[[Signals], None],
    ) -> None:
        self.plan, self.job_id, self.hosts, self.environment = plan, job_id, hosts, dict(environment)
        self.paths, self.warned = paths, warned
        self.run = Run(plan.job.run.dir)
        self.failures: dict[str, int] = _read(self.run)
        self.unfit = {host for host in hosts if self.failures.get(host, 0) >= TWICE}
        if len(self.fit()) < plan.nodes.least:
            self.unfit.clear()  # Slurm has no others for us, it seems
        self.short = False  # whether too few nodes are left

    def fit(self) -> list[str]:
        """The nodes for the next start."""
        return [host for host in self.hosts if host not in self.unfit][: self.plan.nodes.most]

    def attempt(self, folder: Path) -> Step:
        self._forget_lost()
        hosts, environment = self.fit(), self.environment
        words = f"on {len(hosts)} node{'s' if len(hosts) > 1 else ''} ({', '.join(hosts)})"
        print(f"starting {self.plan.processes} ranks each {words}", flush=True)
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
        )

    def _forget_lost(self) -> None:
        """Slurm takes nodes that are down from a job, which --no-kill lets live."""
        with suppress(slurm.SlurmError):
            facts = slurm.job_facts(self.job_id)
            if facts and set(facts.nodes) & set(self.hosts):
                self.hosts = [host for host in self.hosts if host in facts.nodes]

    def after(self, failure: Failure) -> str:
        """Leave out a node that is dead, or has failed twice. Returns why no start is possible here, or nothing."""
        host = failure.host
        if not failure.blames_host or host not in self.hosts:
            return self._too_few()
        self.failures[host] = self.failures.get(host, 0) + 1
        why = ""
        if self.failures[host] >= TWICE:
            why = f"it has failed {self.failures[host]} times"
        elif failure.rank is None and not self._alive(host):
            why = "it does not answer"
            self.failures[host] = TWICE  # for the next job, too
        with suppress(OSError):  # a store that is away is complained of elsewhere
            storage.write(self.run.at("nodes.json"), json.dumps({"failures": self.failures}).encode(), durable=False)
        if why:
            self.unfit.add(host)
            print(f"node {host} is left out from now on: {why}", flush=True)
        return self._too_few()

    def _too_few(self) -> str:
        """Words on how many nodes are left, if those are not enough."""
        self._forget_lost()
        self.short = len(self.fit()) < self.plan.nodes.least
        return f"{len(self.fit())} of at least {self.plan.nodes.least} nodes are left" if self.short else ""

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


def _read(run: Run) -> dict[str, int]:
    try:
        found: dict[str, Any] = json.loads(storage.read(run.at("nodes.json")))
    except (OSError, ValueError):
        return {}
    return {str(host): int(count) for host, count in found.get("failures", {}).items()}
