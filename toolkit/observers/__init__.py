"""What happens beside the loop. Each observer has `start`, `after_step` and `end`; see `toolkit.trainer.Observer`."""
