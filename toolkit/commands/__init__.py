"""The commands beside `toolkit train`. What each needs it imports when it is run: `--help` imports no torch."""
