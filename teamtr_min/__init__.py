"""TeamTR-min: trust-region fine-tuning of teams of language models, from scratch and small enough to read."""

from teamtr_min.hf.tokenizer import load_tokenizer
from teamtr_min.hf.weights import load_model, save_model

__all__ = ["load_model", "load_tokenizer", "save_model"]
