"""What the paper proves: teams that can be enumerated, estimators of the bounds, diagnostics of a run."""
