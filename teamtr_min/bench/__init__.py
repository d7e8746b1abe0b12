"""What eval.py runs: one file per benchmark."""
