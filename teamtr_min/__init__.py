"""TeamTR-min: trust-region fine-tuning of teams of language models, from scratch and small enough to read."""

import importlib
import os

# Before torch loads: OpenMP threads that spin while they wait stall one another once anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "Config": "teamtr_min.config",
    "generate": "teamtr_min.engine.sampler",
    "load_model": "teamtr_min.hf.weights",
    "load_team": "teamtr_min.run.loading",
    "load_tokenizer": "teamtr_min.hf.chat",
    "save_model": "teamtr_min.hf.weights",
    "train": "train",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import a name when it is asked for: `import teamtr_min.config` loads no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
