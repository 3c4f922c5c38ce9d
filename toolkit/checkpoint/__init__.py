"""Checkpoints: what is saved (state), how it lies on disk (checkpointer)."""

from toolkit.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
