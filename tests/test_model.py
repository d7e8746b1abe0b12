"""The transformer against transformers and a real model; attention against its definition."""

import json
import math

import pytest
import torch
from tiny import each_model, in_transformers, random_model, random_tokens, shared

from teamtr_min import load_model, load_tokenizer
from teamtr_min.engine.cache import attend
from teamtr_min.engine.model import split_fused
from teamtr_min.engine.sampler import generate

LONG = 75  # more than twice the length that Llama's stretching starts from


@each_model
def test_logits_and_gradients_equal_transformers(family, tied):
    model = random_model(family, tied, seed=5)
    theirs = in_transformers(model)
    tokens = random_tokens(model, 3, LONG)
    mine, expected = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    for logits in (mine, expected):
        (logits.log_softmax(-1) * weight).mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        for part, grad in split_fused(name, p.grad, model.config).items():
            assert torch.allclose(grad, gradients[part], atol=1e-5, rtol=1e-3), part


@pytest.mark.parametrize("rows, T", [(3, 7), (1, 1), (17, 1), (65, 1)])  # the last by two batched products
@pytest.mark.parametrize("Q, K", [(6, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend_equals_its_definition(rows, T, Q, K, dtype, bound):
    """With views of a cache whose capacity is larger, with and without a mask, at sizes of no multiple."""
    generator = torch.Generator().manual_seed(rows)
    S, capacity, D = 23, 37, 10
    q = torch.randn(rows, T, Q, D, generator=generator, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(rows, K, capacity, D, generator=generator, dtype=dtype)[:, :, :S] for _ in "kv")
    seen = torch.rand(rows, 1, T, S, generator=generator) < 0.5
    seen[..., 0] = True  # a query sees something
    mask, L = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -math.inf), T if T > 1 else S
    causal = torch.zeros(T, L).masked_fill(torch.ones(T, L, dtype=torch.bool).triu(L - T + 1), -math.inf)
    for given, added, x, y in ((mask, mask, k, v), (None, causal, k[:, :, :L], v[:, :, :L])):
        got = attend(q, x, y, given)
        assert got.shape == q.shape and got.dtype == dtype
        keys, values = (t.double().repeat_interleave(Q // K, dim=1) for t in (x, y))  # (B, Q, S, D)
        scores = q.double() @ keys.transpose(2, 3) / math.sqrt(D) + added  # (B, Q, T, S)
        torch.testing.assert_close(got.double(), scores.softmax(-1) @ values, atol=bound, rtol=bound)


@torch.no_grad()
@each_model
def test_bf16_models_give_fp32_logits_that_are_near_the_exact_ones(family, tied, monkeypatch):
    model = random_model(family, tied)
    tokens = random_tokens(model, 2, LONG)
    exact = model(tokens)
    model = model.bfloat16()
    hidden = model.hidden(tokens)
    product = hidden.double() @ model.head.double().t()
    for piece in (2048, 11):
        monkeypatch.setattr("teamtr_min.engine.model.HEAD_PIECE", piece)
        logits = model.logits(hidden)
        assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), product, atol=1e-5, rtol=1e-5)  # never rounded to bf16
    assert (logits - exact).square().mean().sqrt() / exact.std() < 0.05


@pytest.mark.parametrize("layout", ["hf_llama", "hf_qwen2"])
def test_a_real_model_tells_its_story(layout):
    golden = json.loads(shared("stories260K/golden.json").read_text())
    directory, story = shared(f"stories260K/{layout}"), golden["greedy_ids_256"]
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    (completion,) = generate(model, [golden["prompt_ids"]], 256, temperature=0)
    assert golden["prompt_ids"] + completion.tokens == story
    assert tokenizer.decode(story).startswith(golden["expected_text_200"])
    for case in golden["encode_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
    logits = model(torch.tensor([story]))[0]  # (T, V)
    for position, key in ((0, "logits_after_bos_first8"), (200, "logits_pos200_first8")):
        torch.testing.assert_close(logits[position, :8], torch.tensor(golden[key]), atol=1e-4, rtol=0)
    document = torch.tensor(tokenizer.encode(golden["doc_text"]))
    logp = model(document[None])[0].log_softmax(-1)
    nll = -logp[:200].gather(1, document[1:201, None]).mean()
    assert abs(nll - golden["mean_nll_first_200"]) < 1e-5
