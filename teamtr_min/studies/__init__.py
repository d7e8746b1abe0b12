"""Experiments, exact teams, and what makes the shipped models."""
