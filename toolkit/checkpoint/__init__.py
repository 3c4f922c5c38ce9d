"""Checkpoints: saved beside the loop (checkpointer), found and loaded (archive), described in FORMAT.md."""

from toolkit.checkpoint.archive import Archive
from toolkit.checkpoint.checkpointer import Checkpointer
from toolkit.checkpoint.retention import Policy

__all__ = ["Archive", "Checkpointer", "Policy"]
