"""Experiments, and what makes the shipped models; each a program: `python -m teamtr_min.studies.NAME`."""
