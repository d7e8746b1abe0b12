"""Hugging Face transformers as a peer, on the same weights."""

import importlib
from collections.abc import Callable

import torch

from teamtr_min.engine.model import Transformer, checkpoint_tensors
from teamtr_min.hf.weights import config_json


def in_transformers(model: Transformer) -> tuple[Callable | None, str | None]:
    """The same weights, shared and not copied, in transformers' class; without it None and what to do."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        return None, f"pip install transformers to compare ({error})"
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config_json(model.config, model.dtype))
        )
    theirs.load_state_dict(checkpoint_tensors(model), strict=False, assign=True)
    theirs.tie_weights()
    # What is computed when a model is built, the angles of rope, has no data on "meta": build that part anew.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(model.device)
    return theirs.eval(), None
