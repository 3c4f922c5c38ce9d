"""A job's components, looked up and their arguments checked, but not built: what a login node can know of a job."""

from toolkit import components
from toolkit.config import Component, Job
from toolkit.datasets import DATASETS, SHAPES
from toolkit.datasets.transforms import TRANSFORMS
from toolkit.errors import JobError
from toolkit.models import MODELS
from toolkit.optim import OPTIMIZERS, SCHEDULES
from toolkit.tasks import TASKS


def screen(job: Job) -> None:
    """Raises JobError that lists all components that do not exist, or do not take their arguments.

    The user's modules are imported; no data is read and no model made.
    """
    data = job.data
    sets = {"data.train": data.train, "data.val": data.val, "data.test": data.test}
    named = [
        ("task", job.task, TASKS, 0, ()),
        *[(key, one, DATASETS, 0, ()) for key, one in sets.items() if isinstance(one, Component)],
        *[("data.transforms", one, TRANSFORMS, 0, ()) for one in data.transforms],
        ("model", job.model, MODELS, 0, SHAPES),  # which only the data can tell
        ("optimizer", job.optimizer, OPTIMIZERS, 1, ()),
        ("schedule", job.schedule, SCHEDULES, 2, ()),
    ]
    problems = []
    for kind, component, registry, positional, offers in named:
        try:
            constructor = components.find(kind, component.name, registry)
            components.checked_args(kind, component, constructor, positional, dict.fromkeys(offers))
        except JobError as error:
            problems.append(str(error))
    if problems:
        raise JobError("\n".join(problems))
