"""The two ways a run is refused or ends in words. Each message says what was given, what is allowed, what to do."""


class JobError(ValueError):
    """The job, its input or this machine does not fit: said before anything is written. Exit status 2."""


class RunError(RuntimeError):
    """Training has begun and cannot go on, or what it needs did not come though the job is right. Exit status 1."""

    rank: int | None = None  # whose fault it is, where every rank says the same and knows that
