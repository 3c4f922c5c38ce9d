"""The job file: what it may say (schema), how its text is read (text), how it becomes a `Job` (load)."""

from toolkit.config.load import job_file, job_from_text, load_job
from toolkit.config.schema import Component, Fraction, Job

__all__ = ["Component", "Fraction", "Job", "job_file", "job_from_text", "load_job"]
