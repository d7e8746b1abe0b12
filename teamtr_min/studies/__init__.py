"""Experiments and what makes the shipped models: each a program of its own, `python -m teamtr_min.studies.NAME`."""
