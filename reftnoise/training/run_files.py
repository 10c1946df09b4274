"""The names of the files of runs and studies."""

RECIPE, ADAPTER, CHECKPOINTS = "recipe.yaml", "adapter", "checkpoints"
LOG, SUMMARY, SCORES, PREDICTIONS = "log.jsonl", "summary.json", "scores.json", "predictions.jsonl"
STUDY, RESULTS, CELLS = "study.yaml", "results.jsonl", "cells"
LOCK = ".lock"  # of a run or study that is being written
