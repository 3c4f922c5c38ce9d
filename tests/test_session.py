"""The composition root, where no command is needed to see what it does."""

import gc

import pytest

from toolkit.session import settled


def test_what_was_there_before_a_run_is_looked_through_for_garbage_only_after_it() -> None:
    with pytest.raises(ValueError, match="lost"), settled():
        assert gc.get_freeze_count() > 10_000
        raise ValueError("lost")
    assert gc.get_freeze_count() == 0
