"""The transformer against its definition written out, against transformers, and against a real model."""

import json
import math

import pytest
import torch
from tiny import each_model, in_transformers, random_model, random_tokens, shared

from teamtr_min import load_model, load_tokenizer
from teamtr_min.engine.cache import attend
from teamtr_min.engine.model import checkpoint_tensors, split_fused
from teamtr_min.engine.sampler import generate

LONG = 75  # more than twice the length that Llama's stretching starts from


def frequencies_by_definition(config):
    """Angle per position of each pair of head dimensions; Llama 3 keeps short waves, slows down long ones."""
    plain = [config.rope_theta ** (-2 * d / config.head_dim) for d in range(config.head_dim // 2)]
    factor, low, high, original = config.rope_scaling or (1, 0, 1, 0)
    shares = [(original * f / (2 * math.pi) - low) / (high - low) for f in plain]
    if config.rope_scaling:
        assert min(shares) < 0 and max(shares) > 1 and any(0 < s < 1 for s in shares)  # all kinds occur
    keep = [min(max(share, 0), 1) for share in shares]
    return [share * f + (1 - share) * f / factor for share, f in zip(keep, plain)]


def logits_by_definition(model, tokens):
    """tokens (T,) -> logits (T, V), in float64, one position and one head at a time."""
    c, w = model.config, {name: p.double() for name, p in checkpoint_tensors(model).items()}
    frequencies = torch.tensor(frequencies_by_definition(c)).double()

    def norm(x, weight):
        return x / (x.square().mean() + c.norm_eps).sqrt() * weight

    def turned(x, t):  # dimension d and d + D/2 are one complex number, turned by t times its frequency
        number = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(frequencies), t * frequencies)
        return torch.cat((number.real, number.imag))

    def project(attention, name, x, heads):
        bias = w[f"{attention}{name}_proj.bias"] if c.family == "qwen2" else 0
        return (w[f"{attention}{name}_proj.weight"] @ x + bias).view(heads, c.head_dim)

    stream = [w["model.embed_tokens.weight"][token] for token in tokens]
    for i in range(c.layers):
        keys, values, out, layer = [], [], [], f"model.layers.{i}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        for t, x in enumerate(stream):
            h = norm(x, w[layer + "input_layernorm.weight"])
            q, k = project(attention, "q", h, c.heads), project(attention, "k", h, c.kv_heads)
            if c.family == "qwen3":
                q = [norm(head, w[attention + "q_norm.weight"]) for head in q]
                k = [norm(head, w[attention + "k_norm.weight"]) for head in k]
            keys.append([turned(head, t) for head in k])
            values.append(project(attention, "v", h, c.kv_heads))
            mixed = []
            for head in range(c.heads):
                other, query = head * c.kv_heads // c.heads, turned(q[head], t)
                scores = torch.stack([query @ key[other] for key in keys]) / math.sqrt(c.head_dim)
                mixed.append(sum(p * v[other] for p, v in zip(scores.softmax(0), values)))
            x = x + w[attention + "o_proj.weight"] @ torch.cat(mixed)
            h = norm(x, w[layer + "post_attention_layernorm.weight"])
            gate, up = w[mlp + "gate_proj.weight"] @ h, w[mlp + "up_proj.weight"] @ h
            out.append(x + w[mlp + "down_proj.weight"] @ (gate * gate.sigmoid() * up))
        stream = out
    final = torch.stack([norm(x, w["model.norm.weight"]) for x in stream])
    return final @ (w["model.embed_tokens.weight"] if c.tied else w["lm_head.weight"]).t()


@each_model
def test_logits_equal_the_definition_written_out(family, tied):
    model = random_model(family, tied)
    tokens = random_tokens(model, 37)  # past Llama's original length of 32
    expected = logits_by_definition(model, tokens.tolist())
    assert expected.std() > 0.5  # or else agreeing to 1e-4 would mean little
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, atol=1e-4, rtol=0)


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
