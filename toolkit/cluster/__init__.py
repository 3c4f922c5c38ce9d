"""A job on a cluster: planned, submitted, kept alive and watched. Never imports torch."""
