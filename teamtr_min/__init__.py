"""TeamTR-min: trust-region fine-tuning of teams of language models, from scratch and small enough to read."""

import kernels.trust_region
from teamtr_min.hf.tokenizer import load_tokenizer
from teamtr_min.hf.weights import load_model, save_model
from teamtr_min.objective import teamtr_loss

__all__ = ["load_model", "load_tokenizer", "save_model"]

kernels.trust_region.trust_region_reference = teamtr_loss  # handed down: imports only ever point downward
