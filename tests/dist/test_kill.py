"""A few rounds of the kill campaign; `make test-kill` makes hundreds."""

import os
from pathlib import Path

import pytest

from tests.campaigns import starts
from tests.campaigns.kill import campaign
from tests.store.servers import MissingError


@pytest.fixture(scope="session", autouse=True)
def forkserver() -> None:
    starts.warm()


@pytest.mark.parametrize(("store", "rounds"), [("local", 12), ("s3", 5)])
def test_whatever_is_killed_the_run_ends_as_if_nothing_had_been(tmp_path: Path, store: str, rounds: int) -> None:
    try:
        tally = campaign(store, rounds, seed=1, folder=tmp_path)
    except MissingError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    print(tally.line())
    assert not tally.violations
    assert tally.kills == rounds
    assert tally.in_saves >= rounds // 3
    assert tally.equal == tally.runs >= 1
