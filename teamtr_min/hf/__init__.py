"""Hugging Face checkpoints in and out: weights, tokenizers and chat templates, models by name."""
