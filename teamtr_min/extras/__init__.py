"""Beside Algorithm 1: warm start, replacing an agent, diagnostics."""
