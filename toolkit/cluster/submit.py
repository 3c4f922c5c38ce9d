"""From a job file to a queue: checked, its code set aside, handed to submitit. The only door to submitit.

What is submitted is a command and a run's URL, never state: whenever the job starts, again or not, it goes on from the
run's newest checkpoint.
"""

import hashlib
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import storage
from toolkit.cluster import partitions, slurm, snapshot
from toolkit.cluster.guard import keep
from toolkit.cluster.monitor import local_process
from toolkit.cluster.plan import Plan
from toolkit.cluster.queue import ACTIVE
from toolkit.cluster.shared import MOVE, refuse_unseen
from toolkit.config import Job
from toolkit.config.text import dump
from toolkit.errors import JobError
from toolkit.lock import holder_of, newest_claim
from toolkit.run import CANCEL, COMPLETE, STOP, Run

SUBMITTED = "submitted.json"
_A_YEAR_MIN = 525600
_SAME_EVERYWHERE = f"{MOVE}; or, if each node has the same there, name its folder in shared as well"


@dataclass(frozen=True)
class Submission:
    """One job, or an array of them: a plan each. `folder`, seen by all nodes, gets the files of the submission."""

    plans: Sequence[Plan]
    executor: str
    folder: str
    cwd: str
    cluster_text: str
    most_at_once: int | None = None
    takes_snapshot: bool = True


def folder_for(job: Job, scratch: str | None) -> str:
    """A new folder for a submission: in the run, if that is a folder, else under `scratch`. Nothing is written."""
    stamp = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)
    local = storage.local_path(job.run.dir)
    if scratch:
        digest = hashlib.sha256(job.run.dir.encode()).hexdigest()[:12]
        return os.path.join(scratch, f"{job.run.name}-{digest}", stamp)
    if local is None:
        raise JobError(
            f"run.dir {storage.shown(job.run.dir)} is no folder, so Slurm's own files need one that all nodes see: "
            "name it as scratch in the cluster profile"
        )
    return os.path.join(os.path.abspath(local), "slurm", stamp)


def check(submission: Submission, only_shown: bool = False) -> list[Plan]:
    """Raises JobError, with nothing queued or written, if a job is wrong or the cluster cannot take it. What is
    `only_shown` needs no Slurm here.

    Returns the plans that have something left to do.
    """
    plan = submission.plans[0]
    for one in submission.plans:
        one.check()
    if bad := [character for character in "\n%\\" if character in submission.folder]:
        raise JobError(
            f"Slurm cannot write its logs below {submission.folder!r}, for the {bad[0]!r} in it; use another run.dir, "
            "or scratch in the cluster profile"
        )
    if submission.executor == "slurm":
        if not only_shown:
            slurm.require()
        partitions.check(plan.asked())
        for one in submission.plans:
            refuse_unseen(storage.local_path(one.job.run.dir), "run.dir", plan.profile.shared)
            _step(submission, one)
        refuse_unseen(submission.folder, "scratch", plan.profile.shared)
        refuse_unseen(submission.cwd, "the folder the command runs in", plan.profile.shared)
        is_venv = sys.prefix != sys.base_prefix  # else it may be installed on each node
        refuse_unseen(sys.prefix, "this Python", plan.profile.shared if is_venv else (), remedy=_SAME_EVERYWHERE)
    for one in submission.plans:
        _refuse_running(Run(one.job.run.dir))
        Run(one.job.run.dir).refuse_drift(one.job.as_written(), {})
    return [one for one in submission.plans if not _complete(one)]


def _complete(plan: Plan) -> bool:
    if done := Run(plan.job.run.dir).completed(plan.job.as_written()):
        print(f"{done['summary']}\n{COMPLETE}")
    return done is not None


def _refuse_running(run: Run) -> None:
    """Raises JobError if it waits in a queue or runs already, whoever started it."""
    before, claim = _submitted(run), newest_claim(run.at("lock"))
    jobs = {before.get("job_id") if before.get("executor") == "slurm" else None}
    jobs |= {claim["slurm_job_id"] if claim and not claim["released"] else None}
    found = ""
    with suppress(slurm.SlurmError):
        facts = [slurm.job_facts(job_id) for job_id in jobs if job_id]
        found = next((f"job {one.job_id}, which is {one.state}" for one in facts if one and one.state in ACTIVE), "")
    if before.get("executor") == "local" and before["host"] == socket.gethostname() and local_process(before):
        found = f"running on this machine, in the background (pid {before['pid']})"
    if not found and claim and not claim["slurm_job_id"] and (holder := holder_of(run.at("lock"), print)):
        found = f"running on host {holder['host']} (pid {holder['pid']})"
    if found:
        where = storage.shown(run.url)
        raise JobError(
            f"{where} is already {found}; look at it with toolkit status {where}, end it with toolkit cancel {where}"
        )


def _submitted(run: Run) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read(run.at(SUBMITTED)))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found


def submit(submission: Submission) -> list[str]:
    """Hand it over. Returns the jobs' ids, in the order of the plans. Raises JobError, with all as it was before, if
    Slurm refuses it.
    """
    folder, runs = submission.folder, [Run(plan.job.run.dir) for plan in submission.plans]
    with _new([folder, _code_folder(submission)], [storage.local_path(run.url) for run in runs]):
        code = snapshot.take(submission.cwd, _code_folder(submission)) if submission.takes_snapshot else None
        for words in code.words if code else []:
            print(f"WARNING: {words}", file=sys.stderr)
        with _queued(runs):
            commands = [_written(submission, number) for number in range(len(submission.plans))]
            with slurm.as_scripted(submission.plans[0].options()):
                ids = _ids(_executor(submission, code), commands)
    for plan, job_id in zip(submission.plans, ids, strict=True):
        record = {
            "executor": submission.executor,
            "job_id": job_id,
            "pid": int(job_id) if submission.executor == "local" else None,
            "host": socket.gethostname(),
            "folder": folder,
            "log": os.path.join(folder, f"{job_id}_0_log.out"),
            "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        storage.write(storage.join(plan.job.run.dir, SUBMITTED), (json.dumps(record, indent=1) + "\n").encode())
    return ids


@contextmanager
def _new(ours: Sequence[str], others: Sequence[str | None]) -> Iterator[None]:
    """Of these folders, those that are new are gone again if what is done in here fails; `others` if they are empty."""
    paths = [Path(path).absolute() for path in (*ours, *others) if path]
    new = {str(folder) for path in paths for folder in (path, *path.parents) if not folder.exists()}
    try:
        yield
    except BaseException:
        for folder in new.intersection(ours):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in sorted(new, key=len, reverse=True):  # the inner ones first
            with suppress(OSError):  # somebody else has put something there, or it was never made
                os.rmdir(folder)
        raise


@contextmanager
def _queued(runs: Sequence[Run]) -> Iterator[None]:
    """The runs are queued, unless what is done in here fails: then they are as before."""
    before = {run: _content(run.at("status.json")) for run in runs}
    try:
        for run in runs:
            for wish in (STOP, CANCEL):  # nothing runs: they were meant for a start that has ended
                run.granted(wish)
            run.mark("queued", submitted_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        yield
    except BaseException:
        for run, content in before.items():
            if content is None:
                storage.remove(run.at("status.json"))
            else:
                storage.write(run.at("status.json"), content)
        raise


def _content(url: str) -> bytes | None:
    try:
        return storage.read(url)
    except FileNotFoundError:
        return None


def _written(submission: Submission, number: int) -> list[str]:
    """Write one job's file and the profile into the submission's folder. Returns the command that runs it."""
    plan, folder = submission.plans[number], Path(submission.folder)
    folder.mkdir(parents=True, exist_ok=True)
    job_file, cluster_file = folder / f"job-{number}.yaml", folder / "cluster.yaml"
    job_file.write_text(dump(plan.job.as_written()))
    cluster_file.write_text(submission.cluster_text)
    return command_of(submission, str(job_file), str(cluster_file), plan)


def command_of(submission: Submission, job_file: str, cluster_file: str, plan: Plan) -> list[str]:
    """The supervisor of a Slurm job, or of ranks on this machine."""
    if submission.executor == "local":
        processes = ["--processes", str(plan.gpus)] if plan.gpus else []  # else the job says, or what is found here
        return [sys.executable, "-m", "toolkit", "train", job_file, *processes]
    return plan.supervisor(job_file, cluster_file)


def _executor(submission: Submission, code: snapshot.Snapshot | None) -> Any:
    """submitit's, which writes the script, keeps the log and queues. It starts our guard, and does nothing else."""
    import submitit

    if submission.executor == "local":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit would set it to none
        keeps = f"export CUDA_VISIBLE_DEVICES={shlex.quote(visible)}" if visible else "unset CUDA_VISIBLE_DEVICES"
        own = f"exec </dev/null >>{shlex.quote(submission.folder + '/setup.log')} 2>&1"  # not what a pipe waits for
        # In one piece: submitit joins them with &&, and a comment would swallow all that follows.
        setup = "\n".join([own, keeps, "trap '' HUP INT", *_setup(submission, code), "true"])
        local = submitit.LocalExecutor(folder=submission.folder)
        local.update_parameters(timeout_min=_A_YEAR_MIN, stderr_to_stdout=True, setup=[setup])
        return local
    executor = submitit.SlurmExecutor(folder=submission.folder, python=_PYTHON)
    executor.update_parameters(**_parameters(submission, code))
    return executor


# With `exec` the signal that is meant for the batch step reaches the guard, not a shell, which would die of it.
_PYTHON = f"exec {shlex.quote(sys.executable)}"


def _setup(submission: Submission, code: snapshot.Snapshot | None) -> list[str]:
    path, inside = (code.python_path(), code.inside) if code and code.digest else ([], "")
    return submission.plans[0].setup(submission.cwd, path, inside)


def _parameters(submission: Submission, code: snapshot.Snapshot | None) -> dict[str, Any]:
    """What submitit makes the script of; what is None is none of its business."""
    options = submission.plans[0].options()
    return {
        "time": None, "wckey": None, "job_name": options.pop("job-name"), "use_srun": False, "stderr_to_stdout": True,
        "setup": _setup(submission, code), "additional_parameters": options,
        "array_parallelism": submission.most_at_once or len(submission.plans),
    }  # fmt: skip


def _ids(executor: Any, commands: Sequence[list[str]]) -> list[str]:
    from submitit.core.utils import FailedJobError

    try:
        jobs = [executor.submit(keep, commands[0])] if len(commands) == 1 else executor.map_array(keep, commands)
    except FailedJobError as error:
        raise JobError(f"Slurm has refused the job: {str(error).strip()}; nothing is queued") from error
    return [str(job.job_id) for job in jobs]


def dry_run(submission: Submission) -> str:
    """The exact script and commands of a submission, but for the names of files. Nothing is written."""
    plan, folder = submission.plans[0], submission.folder
    parts = []
    if submission.executor == "slurm":
        parts.append(f"# sbatch is given this script:\n{_script(submission)}")
    for number, one in enumerate(submission.plans):
        command = command_of(submission, f"{folder}/job-{number}.yaml", f"{folder}/cluster.yaml", one)
        parts.append(f"# which runs, for {storage.shown(one.job.run.dir)}:\n{shlex.join(command)}")
    if submission.executor == "slurm":
        parts.append(f"# which starts, for all ranks:\n{shlex.join(_step(submission, plan))}")
    return "\n\n".join(parts)


def _step(submission: Submission, plan: Plan) -> list[str]:
    """What starts all ranks. Raises JobError for an image or a path that the container's runtime cannot take."""
    hosts = [f"NODE{number}" for number in range(1, plan.nodes.most + 1)]
    run = storage.local_path(plan.job.run.dir)
    return plan.srun(hosts, [*([run] if run else []), submission.folder, submission.cwd], submission.cwd, os.environ)


def _script(submission: Submission) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    code = snapshot.take(submission.cwd, _code_folder(submission), write=False) if submission.takes_snapshot else None
    count = len(submission.plans)
    command = f"{_PYTHON} -u -m submitit.core._submit {shlex.quote(submission.folder)}"
    parameters = _parameters(submission, code) | ({"map_count": count} if count > 1 else {})
    return str(_make_sbatch_string(command=command, folder=submission.folder, **parameters))


def _code_folder(submission: Submission) -> str:
    """Beside the submissions of a run, which may share a snapshot."""
    return os.path.join(os.path.dirname(submission.folder), "code")
