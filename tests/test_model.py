"""The transformer against its definition written out, against transformers, and against a real model."""

import json
import math

import pytest
import torch
from tiny import CONFIGS, FAMILIES, in_transformers, random_model, random_tokens, shared

from teamtr_min import load_model, load_tokenizer
from teamtr_min.model import KVCache, attend, attend_reference, rope_frequencies
from teamtr_min.sampler import generate

LONG = 75  # more than twice the length that Llama's stretching starts from


def logits_by_definition(model, tokens):
    """tokens (T,) -> logits (T, V), in float64, one position and one head at a time."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(x, weight):
        return x / (x.square().mean() + c.norm_eps).sqrt() * weight

    def turned(x, t):  # dimension d and d + D/2 are one complex number, turned by t times its frequency
        number = torch.complex(*x.chunk(2))
        for d in range(len(number)):
            frequency = c.rope_theta ** (-2 * d / c.head_dim)
            if c.rope_scaling is not None:
                factor, low, high, original = c.rope_scaling
                turns = original * frequency / (2 * math.pi)
                if turns < low:
                    frequency = frequency / factor
                elif turns < high:
                    share = (turns - low) / (high - low)
                    frequency = share * frequency + (1 - share) * frequency / factor
            number[d] *= torch.polar(torch.tensor(1.0).double(), torch.tensor(t * frequency).double())
        return torch.cat((number.real, number.imag))

    def project(layer, name, x, heads):
        y = w[f"model.layers.{layer}.self_attn.{name}_proj.weight"] @ x
        if c.family == "qwen2":
            y = y + w[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
        return y.view(heads, c.head_dim)

    stream = [w["model.embed_tokens.weight"][token] for token in tokens]
    for i in range(c.layers):
        keys, values, out = [], [], []
        layer = f"model.layers.{i}."
        for t, x in enumerate(stream):
            h = norm(x, w[layer + "input_layernorm.weight"])
            q, k = project(i, "q", h, c.heads), project(i, "k", h, c.kv_heads)
            if c.family == "qwen3":
                q = torch.stack([norm(head, w[layer + "self_attn.q_norm.weight"]) for head in q])
                k = torch.stack([norm(head, w[layer + "self_attn.k_norm.weight"]) for head in k])
            keys.append(torch.stack([turned(head, t) for head in k]))
            values.append(project(i, "v", h, c.kv_heads))
            mixed = []
            for head in range(c.heads):
                other = head * c.kv_heads // c.heads
                query = turned(q[head], t)
                scores = torch.stack([query @ key[other] for key in keys]) / math.sqrt(c.head_dim)
                mixed.append(sum(p * v[other] for p, v in zip(scores.softmax(0), values)))
            x = x + w[layer + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            h = norm(x, w[layer + "post_attention_layernorm.weight"])
            gate, up = w[layer + "mlp.gate_proj.weight"] @ h, w[layer + "mlp.up_proj.weight"] @ h
            out.append(x + w[layer + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up))
        stream = out
    final = torch.stack([norm(x, w["model.norm.weight"]) for x in stream])
    return final @ (w["model.embed_tokens.weight"] if c.tied else w["lm_head.weight"]).t()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_definition_written_out(family, tied):
    model = random_model(family, tied)
    tokens = random_tokens(model, 37)  # past Llama's original length of 32
    expected = logits_by_definition(model, tokens.tolist())
    assert expected.std() > 0.5  # or else agreeing to 1e-4 would mean little
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
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
        assert torch.allclose(p.grad, gradients[name], atol=1e-5, rtol=1e-3), name


def test_llama3_frequencies_keep_stretch_and_interpolate():
    config = CONFIGS["llama"]
    factor, low, high, original = config.rope_scaling
    plain = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    turns = original * plain / (2 * math.pi)
    got = rope_frequencies(config, torch.device("cpu"))
    assert got.dtype == torch.float32
    kept, stretched = turns > high, turns < low
    assert kept.any() and stretched.any() and (~kept & ~stretched).any()  # all three kinds occur
    torch.testing.assert_close(got[kept], plain[kept])
    torch.testing.assert_close(got[stretched], plain[stretched] / factor)
    between = ~kept & ~stretched
    assert (got[between] < plain[between]).all() and (got[between] > plain[between] / factor).all()


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (5, 1)])
def test_attend_equals_attend_reference(heads, kv_heads):
    g = torch.Generator().manual_seed(heads)
    B, T, span, D = 3, 7, 11, 10
    q = torch.randn(B, heads, T, D, generator=g)
    k, v = (torch.randn(B, kv_heads, span, D, generator=g) for _ in "kv")
    mask = torch.rand(B, 1, T, span, generator=g) < 0.5
    mask[..., 0] = True  # a query sees something
    torch.testing.assert_close(attend(q, k, v, mask), attend_reference(q, k, v, mask))
    k, v = k[:, :, :T], v[:, :, :T]
    torch.testing.assert_close(attend(q, k, v, None), attend_reference(q, k, v, None))
    assert not torch.allclose(
        attend(q, k, v, None), attend(q, k, v, torch.ones(B, 1, T, T, dtype=torch.bool))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_a_later_token(family):
    model = random_model(family)
    tokens = random_tokens(model, 1, 23)
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % model.config.vocab_size
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(after[:13], before[:13], atol=1e-5, rtol=0)
    assert ((after - before).abs().amax(-1) > 1e-3)[13:].all()  # and every later one does see it


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_equal_one_pass(family):
    """Rows of different lengths, fed in pieces, out of order, with padding, over leftovers in the cache."""
    model = random_model(family)
    lengths = [41, 17, 30, 5]
    tokens = random_tokens(model, 4, max(lengths))
    whole = model.hidden(tokens)
    cache = KVCache(model.config, 4, 2, model.device, model.dtype)
    cache.keys.fill_(1e4), cache.values.fill_(1e4)  # leftovers of somebody else
    got = torch.full_like(whole, math.nan)

    def feed(rows, counts):
        width, index = max(counts), torch.arange(4)[rows]
        start = cache.length[rows].tolist()
        cache.reserve(max(start) + width)
        piece = torch.zeros(len(counts), width, dtype=torch.long)
        for i, (row, n) in enumerate(zip(index, counts)):
            piece[i, :n] = tokens[row, start[i] : start[i] + n]
        hidden = model.hidden(piece, cache, rows)
        for i, (row, n) in enumerate(zip(index, counts)):
            got[row, start[i] : start[i] + n] = hidden[i, :n]
        cache.length[rows] += torch.tensor(counts)

    feed(torch.tensor([2, 0]), [3, 11])
    feed(torch.tensor([3, 1]), [5, 16])
    feed(slice(0, 3), [1, 1, 1])
    feed(torch.tensor([2]), [26])
    for _ in range(29):
        feed(slice(0, 1), [1])
    assert cache.length.tolist() == lengths
    for row, n in enumerate(lengths):
        torch.testing.assert_close(got[row, :n], whole[row, :n], atol=1e-4, rtol=0)


@torch.no_grad()
def test_cache_rows_trade_places_and_copy():
    model = random_model("qwen2")
    tokens = random_tokens(model, 3, 9)
    cache = KVCache(model.config, 3, 0, model.device, model.dtype)
    cache.reserve(9)
    model.hidden(tokens[:, :8], cache)
    cache.length += torch.tensor([8, 5, 7])
    cache.permute(torch.tensor([0, 2, 1]), torch.tensor([2, 0, 0]))  # a swap, and a copy into row 1
    row, at = [2, 0, 0], [7, 8, 8]
    last = model.hidden(tokens[row, at][:, None], cache)[:, 0]
    torch.testing.assert_close(last, model.hidden(tokens)[row, at], atol=1e-5, rtol=0)
    assert cache.keys[:, 0].numel() + cache.values[:, 0].numel() == 9 * model.config.kv_per_token


def test_padding_on_the_right_changes_nothing():
    model = random_model("qwen3")
    tokens = random_tokens(model, 2, 13)
    for filler in (0, 7):
        padded = torch.nn.functional.pad(tokens, (0, 6), value=filler)
        torch.testing.assert_close(model(padded)[:, :13], model(tokens), atol=1e-5, rtol=0)


def test_bf16_models_give_fp32_logits():
    model = random_model("qwen2", tied=False).bfloat16()
    tokens = random_tokens(model, 2, 19)
    hidden = model.hidden(tokens)
    assert hidden.dtype == torch.bfloat16
    expected = hidden.double() @ model.head.double().t()
    logits = model(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_bf16_logits_are_near_fp32_ones():
    model = random_model("llama")
    tokens = random_tokens(model, 2, LONG)
    exact = model(tokens)
    error = (random_model("llama").bfloat16()(tokens) - exact).square().mean().sqrt() / exact.std()
    assert error < 0.05


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("stories260K/golden.json").read_text())


@pytest.mark.parametrize("layout", ["hf_llama", "hf_qwen2"])
def test_a_real_model_tells_its_story(golden, layout):
    directory = shared(f"stories260K/{layout}")
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    story = golden["greedy_ids_256"]
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
