"""A trainer, and runs: a recipe in, a directory with adapter, log and scores out."""
