"""Every fault of the campaign, once, at two ranks; `make test-faults` inflicts them at four, too."""

import os
from pathlib import Path

import pytest

from tests.campaigns import starts
from tests.campaigns.faults import FAULTS, Fault, Outcome, memory_cgroup, suffer, undisturbed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    starts.warm()
    return undisturbed(tmp_path_factory.mktemp("faults") / "undisturbed", processes=2)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_it_is_named_and_the_run_ends_as_if_nothing_had_been(fault: Fault, tmp_path: Path, expected: Outcome) -> None:
    if "cgroup" in fault.name:
        _need_a_cgroup()
    suffer(fault, tmp_path / "run", 2, expected)


def _need_a_cgroup() -> None:
    try:
        memory_cgroup()
    except OSError as error:
        missing = f"no memory cgroup can be made here: {error}; it takes root"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
