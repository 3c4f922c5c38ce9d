"""`toolkit status`, `logs` and `cancel` work on runs in a bucket as on those on disk."""

import time

from tests.store.servers import S3Server
from tests.test_monitor import make, said
from toolkit import storage
from toolkit.cluster.cancel import cancel
from toolkit.cluster.monitor import views
from toolkit.run import CANCEL, Run


def test_runs_in_a_bucket_are_listed_the_best_first_and_their_logs_read(s3_server: S3Server) -> None:
    root = s3_server.fresh_url()
    for name, score in (("a", 0.1), ("b", 0.3), ("c", 0.2)):
        make(f"{root}/{name}", "running", (score,))
    found, many = views(root)
    assert many
    assert [(view.known.url, view.state) for view in found] == [(f"{root}/{name}", "running") for name in "bca"]
    storage.write(f"{root}/a/logs/attempt-1-rank-0.log", b"one\n" * 1000)
    assert said(f"{root}/a") == "one\n" * 1000


def test_a_run_in_a_bucket_is_asked_to_end_and_waited_for(s3_server: S3Server) -> None:
    run, told = make(f"{s3_server.fresh_url()}/x", "running"), list[str]()

    def say(words: str) -> None:
        told.append(words)
        if len(told) == 1:  # what its own process would do, having seen the request
            Run(run.url).mark("cancelled", reason="a cancel request in the run", exit=75)

    began_s = time.monotonic()
    cancel(run.url, 60, False, say)
    assert time.monotonic() - began_s < 30
    assert told[0].startswith(f"asked {run.url} to save everything and end")
    assert told[1] == f"{run.url} is cancelled at step 5: a cancel request in the run"
    assert not storage.exists(run.at("requests", CANCEL))
