"""TeamTR-min: trust-region fine-tuning of teams of language models, from scratch and small enough to read."""

import os

# Before torch loads: OpenMP threads that spin while they wait stall one another once anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["load_model", "load_tokenizer", "save_model"]


def __getattr__(name: str):
    """Load PyTorch only when a model or tokenizer is asked for: `import teamtr_min.config` stays light."""
    if name in ("load_model", "save_model"):
        from teamtr_min.hf import weights

        return getattr(weights, name)
    if name == "load_tokenizer":
        from teamtr_min.hf.chat import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
