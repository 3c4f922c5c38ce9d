"""Slurm's commands are understood, asked rarely, and believed only as far as Slurm 22.05 deserves it.

The outputs were recorded on a real cluster; tests/slurm asks one.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from toolkit.cluster import batch, queue, slurm
from toolkit.cluster.partitions import Asked, check_against, parsed
from toolkit.errors import JobError, RunError

TASK = """JobId=8 ArrayJobId=2 ArrayTaskId=0 JobName=a JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901758 Nice=0 Account=root QOS=normal
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:19 TimeLimit=00:03:00 TimeMin=N/A
   SubmitTime=1795653733 EligibleTime=1795653733
   AccrueTime=1795653733
   StartTime=1795653733 EndTime=1795653913 Deadline=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1-2]
   BatchHost=n1
   Command=/jobs/JobState=FAILED /a.sh
   StdOut=/jobs/my out/slurm-2_0.out
   Power=
"""
WAITING = TASK.replace("JobId=8", "JobId=2").replace("TaskId=0", "TaskId=1-3%1").replace("RUNNING", "PENDING")
WAITING = WAITING.replace("n[1-2]", "(null)").replace("EndTime=1795653913", "EndTime=Unknown")
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes commands that print what they are given, all there are on the PATH; each notes its calls in NAME.calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def make(name: str, out: str = "", err: str = "", status: int = 0) -> Path:
        for kind, text in (("out", out), ("err", err)):
            (programs / f"{name}.{kind}").write_text(text)
        base = programs / name
        base.write_text(
            f'#!/bin/sh\necho "$LC_ALL $SLURM_TIME_FORMAT $SQUEUE_FORMAT $*" >> "{base}.calls"\n'
            f'/bin/cat "{base}.err" >&2\n/bin/cat "{base}.out"\nexit {status}\n'
        )
        base.chmod(0o755)
        return Path(f"{base}.calls")

    return make


def calls(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", "n1"),
        ("n[1-3,07-09],gpu-a[1-2]b[3-4]", "n1 n2 n3 n07 n08 n09 gpu-a1b3 gpu-a1b4 gpu-a2b3 gpu-a2b4"),
        ("n[098-102]", "n098 n099 n100 n101 n102"),
        ("a,b,c[5]", "a b c5"),
        ("r[1-2]n[1-2]-ib", "r1n1-ib r1n2-ib r2n1-ib r2n2-ib"),
        ("", ""),
    ],
)
def test_a_list_of_nodes_is_expanded(nodelist: str, hosts: str) -> None:
    assert slurm.expand(nodelist) == hosts.split()


@pytest.mark.parametrize(
    "nodelist",
    ["n[1", "n1]", "n[]", "n[3-1]", "n[a-b]", "n[1-]", "a,,b", ",a", "a,", "a b", "n[[1]]", "n[1-999999999]",
     "n[1-999]m[1-999]", "n[١-٣]"],
)  # fmt: skip
def test_what_is_no_list_of_nodes_is_refused(nodelist: str) -> None:
    with pytest.raises(ValueError, match=r"no list|more than 65536"):
        slurm.expand(nodelist)


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z-]{0,4}", fullmatch=True),
            st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), min_size=1, max_size=3),
            st.integers(1, 4),
        ),
        max_size=4,
    )
)
def test_a_compressed_list_gives_the_hosts_it_was_made_of(groups: list[tuple[str, list[tuple[int, int]], int]]) -> None:
    hosts, words = [], []
    for prefix, ranges, width in groups:
        spans = [(first, first + length) for first, length in ranges]
        words.append(f"{prefix}[{','.join(f'{first:0{width}}-{last:0{width}}' for first, last in spans)}]")
        hosts += [f"{prefix}{number:0{width}}" for first, last in spans for number in range(first, last + 1)]
    assert slurm.expand(",".join(words)) == hosts


def test_the_facts_of_a_job_are_not_those_of_its_name(fake: Fake) -> None:
    noted = fake("scontrol", WAITING + "\n" + TASK)
    facts = slurm.job_facts("2_0")
    assert facts == slurm.JobFacts(
        "2_0", "8", "RUNNING", "None", True, 0, ("n1", "n2"), (), 1795653913.0, "/jobs/my out/slurm-2_0.out"
    )
    assert slurm.job_facts("8") == facts
    assert slurm.job_facts("2_7") is None
    assert calls(noted)[0] == "C %s  show job 2_0"


def test_a_waiting_job_has_no_nodes_and_no_end(fake: Fake) -> None:
    fake("scontrol", WAITING)
    facts = slurm.job_facts("2")
    assert facts
    assert (facts.job_id, facts.state, facts.nodes, facts.ends_at_s) == ("2_1-3%1", "PENDING", (), None)


@pytest.mark.parametrize(
    ("out", "err"), [("", "slurm_load_jobs error: Invalid job id specified"), ("Job 26_1 not found", "")]
)
def test_a_job_that_slurm_has_forgotten_is_none(fake: Fake, out: str, err: str) -> None:
    fake("scontrol", out, err, status=1)
    assert slurm.job_facts("26_1") is None
    assert slurm.requeue("26_1", 0) == "unknown"


@pytest.mark.parametrize(
    ("state", "became"),
    [
        ("RUNNING Reason=None", slurm.REQUEUED),
        ("COMPLETING Reason=TimeLimit", slurm.REQUEUED),  # for which Slurm does not queue it again by itself
        ("TIMEOUT Reason=TimeLimit", slurm.REQUEUED),
        ("PENDING Reason=BeginTime", slurm.BY_SLURM),
        ("COMPLETING Reason=None", "COMPLETING"),
        ("CANCELLED Reason=None", "CANCELLED"),
        ("COMPLETED Reason=None", "COMPLETED"),
    ],
)
def test_only_a_job_that_runs_or_has_run_out_of_time_is_queued_again(fake: Fake, state: str, became: str) -> None:
    noted = fake("scontrol", TASK.replace("RUNNING Reason=None", state))
    assert slurm.requeue("2_0", 0) == became
    assert len([call for call in calls(noted) if "requeue" in call]) == (became == slurm.REQUEUED)


def test_a_later_start_of_the_job_is_left_alone(fake: Fake) -> None:
    noted = fake("scontrol", TASK.replace("Restarts=0", "Restarts=1"))
    assert slurm.requeue("2_0", 0) == slurm.BY_SLURM
    assert slurm.requeue("2_0", 1) == slurm.REQUEUED
    assert [call for call in calls(noted) if "requeue" in call] == ["C %s  requeue 2_0"]


def test_the_task_of_an_array_is_not_the_whole_array() -> None:
    assert slurm.own_job({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}) == "12_1"
    assert slurm.own_job({"SLURM_JOB_ID": "12"}) == "12"
    assert slurm.own_job({}) is None


@pytest.mark.parametrize(
    "said",
    [AWAY, "Unexpected message received for job 2_0", "error: Socket timed out on send/recv operation",
     "sacct: error: slurm_persist_conn_open: failed: h:6819: Connection refused"],
)  # fmt: skip
def test_a_controller_that_is_away_is_waited_for(fake: Fake, said: str) -> None:
    noted = fake("scontrol", err=said, status=1)
    began_s = time.monotonic()
    with pytest.raises(slurm.AwayError, match=r"scontrol show job: .+"):
        slurm.job_facts("2_0", patience_s=1.0)
    assert 0.9 < time.monotonic() - began_s < 5
    assert len(calls(noted)) == 3


def test_a_requeue_is_tried_until_the_controller_is_back(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = fake("scontrol", err=AWAY, status=1)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: fake("scontrol", TASK))
    assert slurm.requeue("2_0", 0) == slurm.REQUEUED
    assert [call.split()[2] for call in calls(noted)] == ["show", "show", "requeue"]


def test_a_requeue_that_is_refused_at_the_time_limit_is_an_error(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("scontrol", TASK.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit"))
    real = slurm.ask

    def ask(*words: str, **more: Any) -> str:
        if "requeue" in words:
            raise slurm.SlurmError("Job is not batch")
        return real(*words, **more)

    monkeypatch.setattr(slurm, "ask", ask)
    with pytest.raises(slurm.SlurmError, match="Job is not batch"):
        slurm.requeue("2_0", 0)


def test_who_has_a_job_queued_again_waits_for_slurm_as_long_as_it_takes(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake("scontrol", err=AWAY, status=1)
    monkeypatch.setattr(batch, "SAID_S", 0.2)
    back = threading.Timer(1.0, lambda: fake("scontrol", TASK))
    back.start()
    assert batch._requeue("2_0", 0) == slurm.REQUEUED
    assert capfd.readouterr().err.count("job 2_0 is to be queued again, and Slurm is waited for: scontrol show job") > 1


def test_commands_that_are_missing_refuse_or_hang_are_told_apart(fake: Fake) -> None:
    with pytest.raises(slurm.NoSlurmError, match="no squeue here"):
        slurm.ask("squeue")
    with pytest.raises(JobError, match="no sbatch here: submit on a login node"):
        slurm.require()
    fake("scancel", err="scancel: error: Access/permission denied", status=1)
    with pytest.raises(slurm.SlurmError, match="scancel 3: scancel: error: Access/permission denied"):
        slurm.cancel("3")
    with pytest.raises(slurm.AwayError, match="no answer within 0.2 s"):
        slurm.ask("/bin/sleep", "9", timeout_s=0.2)


def test_what_the_user_has_set_for_squeue_is_not_heard(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_FORMAT", "%u")
    noted = fake("squeue")
    slurm.ask("squeue", "-h")
    assert calls(noted) == ["C %s  -h"]


# squeue --array --states=all --format=%i|%A|%T|%r|%S
SQUEUE = """3_1|3|PENDING|JobArrayTaskLimit|N/A
4|4|PENDING|BeginTime|1795654333
2_0|8|RUNNING|None|1795653733
2_1|2|RUNNING|None|1795653733
19|19|PENDING|DependencyNeverSatisfied|N/A
16|16|CANCELLED|None|1795654421
"""
# sacct --parsable2 --allocations --format=JobID,JobIDRaw,State,Reason
SACCT = """18|18|CANCELLED by 0|None
2_0|8|COMPLETED|BeginTime
14|14|PREEMPTED|None
7|7|RUNNING|None
"""


def test_squeue_is_asked_first_and_sacct_of_what_it_does_not_know(fake: Fake) -> None:
    fake("squeue", SQUEUE)
    past = fake("sacct", SACCT)
    answer = queue.look(["4", "2_1", "8", "18", "99"])
    assert {job: entry.state for job, entry in answer.entries.items()} == {
        "4": "PENDING", "2_1": "RUNNING", "8": "RUNNING", "18": "CANCELLED"
    }  # fmt: skip
    assert answer.entries["4"].starts_at_s == 1795654333
    assert answer.entries["2_1"].starts_at_s is None
    assert calls(past)[0].endswith("--jobs=18,99")


def test_a_job_of_another_user_is_asked_for_by_its_number_and_has_its_turn(fake: Fake, tmp_path: Path) -> None:
    noted = fake("squeue")
    (noted.parent / "squeue.out").unlink()
    squeue = noted.parent / "squeue"
    theirs = "echo '5|5|PENDING|Priority|N/A'; echo '6|6|PENDING|Priority|N/A'"
    squeue.write_text(f'#!/bin/sh\necho "$*" >> "{noted}"\ncase "$*" in *--jobs*) {theirs};; esac\n')
    assert queue.look(["5"]).entries["5"].why() == "other jobs come first (Priority)"
    noted.unlink()
    assert (queue.look(["5"]).unasked, queue.look(["7"]).unasked) == ([], ["7"])
    assert not calls(noted), "one round of questions in 10 s"
    (kept,) = tmp_path.glob("toolkit-*/queue-*.json")
    tree = json.loads(kept.read_text())
    tree["queue"]["at_s"] -= queue.PERIOD_S
    kept.write_text(json.dumps(tree))
    assert set(queue.look(["5"]).entries) == {"5"}
    assert calls(noted)[1].endswith("--jobs=5,7")


def test_without_accounting_what_squeue_does_not_know_is_unknown(fake: Fake) -> None:
    fake("squeue", SQUEUE)
    assert set(queue.look(["4", "18"]).entries) == {"4"}
    fake("sacct", err="Slurm accounting storage is disabled", status=1)
    assert set(queue.look(["4", "18"]).entries) == {"4"}


def test_without_squeue_scontrol_is_asked(fake: Fake) -> None:
    fake("scontrol", WAITING + "\n" + TASK)
    assert queue.look(["2_0"]).entries["2_0"].state == "RUNNING"


def test_without_slurm_nothing_is_known_and_that_is_said(fake: Fake) -> None:
    answer = queue.look(["1"])
    assert (answer.entries, answer.problem, answer.here) == ({}, None, False)


def test_no_job_costs_no_question(fake: Fake) -> None:
    noted = fake("squeue", SQUEUE)
    queue.look([])
    assert not calls(noted)


@pytest.mark.parametrize("fails", [False, True])
def test_many_processes_ask_slurm_once(fake: Fake, tmp_path: Path, fails: bool) -> None:
    noted = fake("squeue", "" if fails else SQUEUE, AWAY if fails else "", int(fails))
    past = fake("sacct", SACCT)
    code = "from toolkit.cluster.queue import look; answer = look(['4', '77']); print(answer.problem)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in started}
    assert said == {f"squeue --noheader --array: {AWAY}" if fails else "None"}
    assert len(calls(noted)) == (1 if fails else 2)  # for this user's jobs, and for one that is not among them
    assert len(calls(past)) == (0 if fails else 1)
    (kept,) = tmp_path.glob("toolkit-*/queue-*.json")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_an_old_answer_and_a_damaged_one_are_asked_for_anew(fake: Fake, tmp_path: Path) -> None:
    noted = fake("squeue", SQUEUE)
    queue.look(["4"])
    (kept,) = tmp_path.glob("toolkit-*/queue-*.json")
    tree = json.loads(kept.read_text())
    for age_s, expected in ((9, 1), (11, 2), (-60, 3)):
        tree["queue"]["at_s"] = time.time() - age_s
        kept.write_text(json.dumps(tree))
        queue.look(["4"])
        assert len(calls(noted)) == expected
    kept.write_text('{"que')
    queue.look(["4"])
    assert len(calls(noted)) == 4


def test_a_folder_that_others_can_write_is_not_trusted(fake: Fake, tmp_path: Path) -> None:
    fake("squeue", SQUEUE)
    (tmp_path / f"toolkit-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"toolkit-{os.getuid()}").chmod(0o777)
    with pytest.raises(RunError, match="a folder of yours alone"):
        queue.look(["4"])


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "it waits for free nodes (Resources)"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "a node it needs is down, drained or reserved (ReqNode"),
        ("launch_failed_requeued_held", "a node could not start it, and it is held"),
        ("QOSMaxJobsPerUserLimit", "a limit of its QOS is reached (QOSMaxJobsPerUserLimit)"),
        ("AssocGrpCpuLimit", "a limit of its account is reached"),
        ("PartitionTimeLimit", "its partition does not allow so long a time"),
        ("JobArrayTaskLimit", "as many of its sweep run as --max-parallel allows"),
        ("PriorityInventedLater", "other jobs come first"),
        ("Quux", "Slurm's reason: Quux"),
    ],
)
def test_why_a_job_waits_is_said_in_words(reason: str, words: str) -> None:
    assert queue.why(reason).startswith(words)


# sinfo --all --exact --noheader --format=%P|%a|%l|%D|%c|%m|%G
SINFO = """main*|up|infinite|4|4|8000|gpu:fake:2
urgent|up|1-02:30:00|4|4|8000|gpu:fake:2(S:0)
mixed|up|30:00|2|64|512000|gpu:a100:4(S:0-1),gpu:v100:2,nvme:1
mixed|up|30:00|6|32|64000|(null)
closed|drain|infinite|4|4|8000|(null)
"""


def test_partitions_are_read_with_all_their_kinds_of_nodes() -> None:
    main, urgent, mixed, _ = parsed(SINFO)
    assert (main.default, main.max_min, main.shapes[0].gpus) == (True, float("inf"), 2)
    assert (urgent.default, urgent.max_min, urgent.shapes[0].gpus) == (False, 26 * 60 + 30, 2)
    assert [(shape.nodes, shape.cpus, shape.gpus) for shape in mixed.shapes] == [(2, 64, 6), (6, 32, 0)]
    assert mixed.max_min == 30


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            Asked("nope"),
            "there is no partition nope; choose one of\n  main (default): 4 nodes of 4 CPUs, 7.8 GB, 2 GPUs",
        ),
        (Asked(nodes=5), "partition main: 5 nodes were asked for, and it has 4"),
        (Asked("mixed", gpus_per_node=8), "8 GPUs a node were asked for, and no node has more than 6"),
        (Asked("mixed", nodes=3, gpus_per_node=2), "3 nodes were asked for, and only 2 of its 8 have all the rest"),
        (Asked("mixed", time_min=31), "31 min were asked for, and at most 30 min are allowed"),
        (
            Asked("main", cpus_per_node=5, mem_gb_per_node=9),
            "5 CPUs a node were asked for, and no node has more than 4",
        ),
        (
            Asked("main", cpus_per_node=5, mem_gb_per_node=9),
            "9 GB a node were asked for, and no node has more than 7.812",
        ),
        (Asked("closed"), "takes no jobs now: it is drain"),
        (Asked("urgent,mixed", time_min=9999), "partition mixed: 9999 min"),
    ],
)
def test_what_no_partition_can_give_is_refused_with_what_there_is(asked: Asked, words: str) -> None:
    with pytest.raises(JobError) as caught:
        check_against(parsed(SINFO), asked)
    assert words in str(caught.value)
    assert "urgent: 4 nodes" in str(caught.value)


@pytest.mark.parametrize("asked", [Asked(), Asked("main,mixed", time_min=99), Asked("mixed", 2, 6, 64, 500, 30)])
def test_what_can_be_given_passes(asked: Asked) -> None:
    check_against(parsed(SINFO), asked)


def test_without_a_default_one_must_be_named() -> None:
    with pytest.raises(JobError, match="no default partition; name one"):
        check_against(parsed(SINFO.replace("*", "")), Asked())
