"""Evaluation: retrieval metrics, baselines without a model, and the report of a run."""
