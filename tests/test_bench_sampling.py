"""The sampling benchmark at toy sizes: one object, one table, transformers or what to do without it."""

import json
import sys

import pytest
import torch
from tiny import random_model

import eval as evaluation
from teamtr_min.bench import sampling


def test_one_table_and_one_object(capsys):
    pytest.importorskip("transformers", reason="compares with transformers")
    assert evaluation.main(["sampling", "--short", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    rates = row["tokens_per_second"]
    assert row["ratio"] == pytest.approx(rates["ours"] / rates["transformers"])
    assert 0 < row["floor_share"] < 1 and result["episode"]["ratio"] > 0
    assert "ratio" in sampling.table(result) and "an episode of 16 rollouts" in sampling.table(result)
    assert torch.cuda.is_available() or "on a GPU: not measured yet" in sampling.table(result)


def test_without_transformers_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert evaluation.main(["sampling", "--short"]) == 0
    assert "pip install transformers to compare" in capsys.readouterr().out


@torch.no_grad()
def test_the_peer_has_the_same_weights():
    pytest.importorskip("transformers", reason="compares with transformers")
    for family, tied in (("qwen2", True), ("llama", False)):
        model = random_model(family, tied)
        theirs, _ = sampling.in_transformers(model)
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)


def test_the_floor_of_a_model_counted_by_hand():
    """Two parameters' worth of arithmetic and bytes: one limit at a time."""
    model = random_model("qwen2")
    c, parameters = model.config, sum(p.numel() for p in model.parameters())
    machine = {"copy_bytes_per_second": 1.0, "matmul_flops_per_second": 1e30}
    span = 32 + 5 / 2
    assert sampling.floor_seconds(model, 3, 5, machine) == 5 * 4 * (parameters + 3 * span * c.kv_per_token)
    machine = {"copy_bytes_per_second": 1e30, "matmul_flops_per_second": 1.0}
    head, fed = c.vocab_size * c.hidden_size, 32 + 5 - 1
    pairs = fed * (fed + 1) / 2
    flops = 2 * (parameters - head) * fed + 2 * head * 5 + 4 * c.layers * c.heads * c.head_dim * pairs
    assert sampling.floor_seconds(model, 3, 5, machine) == 3 * flops
