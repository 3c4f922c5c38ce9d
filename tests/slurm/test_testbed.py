"""The testbed itself: it is a Slurm cluster, and its nodes, cables and daemons can be broken one by one and mended."""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import BED, Cluster, words_of

# Takes note of USR2, to the shell as to the step, and goes on.
NOTING = """
trap 'echo shell USR2 >> signals' USR2
srun --overlap bash -c 'trap "echo step USR2 >> signals" USR2; touch started; while :; do sleep 0.2; done' &
while :; do wait; done
"""


def pids(status: str) -> list[str]:
    return [line for line in status.splitlines() if ": up (" in line]


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_a_job_runs_on_two_nodes_each_with_its_own_name_address_memory_and_gpus(cluster: Cluster) -> None:
    job = cluster.sbatch(
        """touch /dev/shm/mark
        srun bash -c 'echo $(hostname) $(hostname -I) $CUDA_VISIBLE_DEVICES $(ls /dev/shm) $(cat /proc/1/comm)' > said
        rm /dev/shm/mark""",
        "--nodes=2",
        "--gpus-per-node=2",
        "--nodelist=n2,n3",
    )
    cluster.wait(job, "COMPLETED")
    assert sorted(lines(cluster.folder / "said")) == ["n2 10.77.0.12 0,1 mark tini", "n3 10.77.0.13 0,1 tini"]


def test_a_second_up_changes_nothing(cluster: Cluster) -> None:
    job = cluster.sbatch("sleep 60")
    cluster.wait(job, "RUNNING")
    before = pids(words_of(BED, "status"))
    words_of(BED, "up")
    assert pids(words_of(BED, "status")) == before
    assert len(before) == 4
    assert cluster.show(job)["JobState"] == "RUNNING"


@pytest.mark.campaign
def test_an_urgent_job_takes_the_nodes_after_a_warning(cluster: Cluster) -> None:
    job = cluster.sbatch(NOTING, "--nodes=2", "--nodelist=n1,n2", "--exclusive", "--signal=B:USR2@60")
    cluster.until((cluster.folder / "started").exists, "the step")
    urgent = cluster.sbatch("true", "--partition=urgent", "--nodelist=n1", "--exclusive")
    cluster.until(lambda: "shell USR2" in lines(cluster.folder / "signals"), "USR2", timeout_s=8)
    assert cluster.show(job)["JobState"] == "RUNNING", "the warning must come before the end"
    cluster.wait(urgent, "COMPLETED")
    assert "step USR2" not in lines(cluster.folder / "signals")
    cluster.wait(job, "PENDING", "RUNNING", restarts=1)


@pytest.mark.campaign
def test_a_job_whose_node_dies_starts_again_elsewhere(cluster: Cluster) -> None:
    job = cluster.sbatch("srun sleep 60", "--nodes=2", "--requeue", "--exclude=n1")
    cluster.wait(job, "RUNNING")
    cluster.node_kill(2)
    cluster.wait_node(2, "down")
    again = cluster.wait(job, "RUNNING", restarts=1)
    assert again["NodeList"] == "n[3-4]"
    cluster.node_boot(2)
    cluster.wait_node(2, "idle")


@pytest.mark.campaign
def test_a_node_without_its_cable_is_down_until_it_is_joined(cluster: Cluster) -> None:
    cluster.net_cut(4)
    unreachable = ["timeout", "2", "bash", "-c", "echo > /dev/tcp/10.77.0.14/6818"]
    assert subprocess.run(unreachable, capture_output=True, check=False, timeout=10).returncode
    cluster.wait_node(4, "down")
    assert "slurmd" in cluster.execute(4, "ps", "-e"), "the node itself goes on"
    cluster.net_join(4)
    cluster.wait_node(4, "idle")


@pytest.mark.campaign
def test_a_job_outlives_the_controller_and_its_nodes_slurmd(cluster: Cluster) -> None:
    job = cluster.sbatch("touch started; until [ -e finish ]; do sleep 0.1; done; echo finished", "--nodelist=n3")
    started = cluster.folder / "started"
    cluster.until(started.exists, "the job")
    state = Path("/var/lib/toolkit-slurm/state/job_state")
    cluster.until(lambda: state.stat().st_mtime > started.stat().st_mtime + 1, "the controller's writing it down")
    cluster.slurmctld_kill()
    cluster.slurmd_kill(3)
    cluster.slurmctld_start()
    cluster.slurmd_start(3)
    assert cluster.show(job)["JobState"] == "RUNNING"
    (cluster.folder / "finish").touch()
    cluster.wait(job, "COMPLETED")
    assert cluster.show(job)["Restarts"] == "0"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--partition=tiny", "--nodes=2"), "Node count specification invalid"),
        (("--partition=short", "--time=5"), "Requested time limit is invalid"),
        (("--partition=none",), "invalid partition specified: none"),
    ],
)
def test_what_can_never_run_is_refused_by_sbatch(cluster: Cluster, options: tuple[str, ...], said: str) -> None:
    done = subprocess.run(["sbatch", *options, "--wrap=true"], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode
    assert said in done.stderr


def test_a_node_that_does_not_exist_is_refused(testbed: None) -> None:
    done = subprocess.run([BED, "node-kill", "5"], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (2, "which node? cluster node-kill N, where N is 1 to 4\n")


def test_without_root_it_says_so_in_one_line(testbed: None) -> None:
    words = ["unshare", "--user", BED, "up"]  # user 65534 there
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2
    assert "needs root" in done.stderr
    assert len(done.stderr.splitlines()) == 1


INSTALLING = """
set -euo pipefail
say() { :; }
BASE=$PWD POLICY=$PWD/policy SYSTEMD=$PWD OURS="# ours" SELF=$$
dpkg-query() { case "${!#}" in mariadb-server | munge | tini) echo installed ;; *) return 1 ;; esac; }
apt-get() { cat "$POLICY" >>policies; [ "$1" != install ] || $1_ends; }
systemctl() { echo "$*" >disabled; }
. "$1"
install_ends() { %s; }
install_packages
"""


@pytest.mark.parametrize("ends", ["true", "false", "kill $SELF; sleep 9"])
def test_up_turns_off_no_daemon_that_was_here_before_and_forbids_none_for_longer_than_it_installs(
    ends: str, tmp_path: Path
) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "policy").write_text("the user's own")
    words = ["bash", "-c", INSTALLING % ends, "bash", str(BED.parent / "install.sh")]
    done = subprocess.run(words, cwd=tmp_path, timeout=30, check=False, capture_output=True, text=True)
    assert (done.returncode == 0) == (ends == "true"), done.stderr
    assert "exit 101" in (tmp_path / "policies").read_text()
    assert [path.read_text() for path in tmp_path.glob("policy*")].count("the user's own") == 1
    assert (tmp_path / "policy").read_text() == "the user's own"
    if ends == "true":
        assert sorted((tmp_path / "disabled").read_text().split()) == [
            "--quiet",
            "disable",
            "slurmctld",
            "slurmd",
            "slurmdbd",
        ]
