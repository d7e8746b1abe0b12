"""The program that makes the shipped models."""

import pytest
import torch

from teamtr_min.hf.chat import load_tokenizer
from teamtr_min.hf.weights import ASSETS
from teamtr_min.studies import pretrain


@pytest.mark.parametrize("task", pretrain.COURSES)
def test_pretraining_lowers_the_loss_to_the_same_bits(task, monkeypatch):
    monkeypatch.setattr(pretrain, "ROWS", 16)
    tokenizer, losses = load_tokenizer(ASSETS / task), []
    for steps in (2, 24, 24):
        torch.rand(3)  # the state of torch's generator has no part in it
        model = pretrain.initial_model(tokenizer.vocab_size)
        losses.append(pretrain.train(model, tokenizer, pretrain.COURSES[task]._replace(steps=steps)))
    assert losses[1] == losses[2] < 0.9 * losses[0]
