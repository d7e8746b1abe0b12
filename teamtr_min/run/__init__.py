"""The run around the loop: its directory, its lines on the terminal, metrics, checkpoints."""
