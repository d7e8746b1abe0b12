"""The transformer against its definition written out, against transformers, and against a real model."""

import json
import math

import pytest
import torch
from teamtr_min.engine.attention import attend, attend_by_products, attend_reference
from tiny import FAMILIES, each_model, in_transformers, random_model, random_tokens, shared

from teamtr_min import load_model, load_tokenizer
from teamtr_min.engine.model import KVCache, checkpoint_tensors, rope_table, rotate, split_fused
from teamtr_min.engine.sampler import generate

LONG = 75  # more than twice the length that Llama's stretching starts from


def frequencies_by_definition(config):
    """Angle per position of each pair of head dimensions; Llama 3 keeps short waves, slows down long ones."""
    plain = [config.rope_theta ** (-2 * d / config.head_dim) for d in range(config.head_dim // 2)]
    if config.rope_scaling is None:
        return plain
    factor, low, high, original = config.rope_scaling
    shares = [(original * f / (2 * math.pi) - low) / (high - low) for f in plain]
    assert min(shares) < 0 and max(shares) > 1 and any(0 < share < 1 for share in shares)  # all kinds occur
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


@pytest.mark.parametrize("Q, K", [(6, 2), (3, 3), (5, 1)])
def test_attend_equals_attend_reference(Q, K):
    generator = torch.Generator().manual_seed(Q)
    B, T, span, D = 3, 7, 11, 10
    q = torch.randn(B, Q, T, D, generator=generator)
    k, v = (torch.randn(B, K, span, D, generator=generator) for _ in "kv")
    hidden = torch.rand(B, 1, T, span, generator=generator) < 0.5
    hidden[..., 0] = False  # a query sees something
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(attend(q, k, v, mask), attend_reference(q, k, v, mask))
    k, v = k[:, :, :T], v[:, :, :T]
    torch.testing.assert_close(attend(q, k, v, None), attend_reference(q, k, v, None))
    everything = torch.zeros(B, 1, T, T)
    assert not torch.allclose(attend(q, k, v, None), attend(q, k, v, everything))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 17, 65])  # the last by batched products
@pytest.mark.parametrize("Q, K", [(5, 1), (6, 3), (3, 3)])
def test_one_new_token_a_row_attends_as_the_reference_does(rows, Q, K):
    """With views of a cache whose capacity is larger, with and without a mask, at a span of no multiple."""
    generator = torch.Generator().manual_seed(rows)
    span, capacity, D = 23, 37, 10
    q = torch.randn(rows, 1, Q, D, generator=generator).transpose(1, 2)  # (B, Q, T, D)
    k, v = (torch.randn(rows, K, capacity, D, generator=generator)[:, :, :span] for _ in "kv")
    seen = torch.arange(span) < torch.randint(1, span + 1, (rows, 1, 1, 1), generator=generator)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    for given in (mask, None):
        got = attend(q, k, v, given)
        assert got.shape == q.shape
        torch.testing.assert_close(got, attend_reference(q, k, v, given), atol=1e-5, rtol=0)


def test_batched_products_equal_the_kernel_they_replace(monkeypatch):
    q = torch.randn(65, 6, 1, 10, generator=torch.Generator().manual_seed(0))
    k = torch.randn(65, 2, 23, 10, generator=torch.Generator().manual_seed(1))
    products = attend(q, k, k, None)
    torch.testing.assert_close(attend_by_products(q.view(65, 2, 3, 10), k, k, None).view(q.shape), products)
    monkeypatch.setattr("teamtr_min.engine.attention.PRODUCTS_FROM_ROWS", 66)
    torch.testing.assert_close(attend(q, k, k, None), products)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rope_table_holds_the_angles_of_every_position(family):
    config = random_model(family).config
    cos, sin = rope_table(config, 37, torch.device("cpu"), torch.float32)  # (37, 1, D)
    x = torch.randn(1, 37, 3, config.head_dim, generator=torch.Generator().manual_seed(0))
    a, b = x.double().chunk(2, -1)
    angle = torch.arange(37)[:, None, None] * torch.tensor(frequencies_by_definition(config))
    number = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((number.real, number.imag), -1)
    torch.testing.assert_close(rotate(x, cos, sin).double(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
def test_equally_long_rows_need_no_mask(rows, monkeypatch):
    """Of single tokens: with the common length told and without, the same hidden states."""
    model = random_model("qwen3")  # three key heads
    tokens = random_tokens(model, rows, 13)
    masks, seen = [], []
    monkeypatch.setattr(
        "teamtr_min.engine.model.attend", lambda q, k, v, mask: masks.append(mask) or attend(q, k, v, mask)
    )
    for told in (True, False):
        cache = KVCache(model.config, rows, 0, model.device, model.dtype)
        masks.clear()
        hidden = []
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 13)):
            cache.reserve(stop, start if told else None)
            hidden.append(model.hidden(tokens[:, start:stop], cache))
            cache.length += stop - start
        seen.append(torch.cat(hidden, 1))
        assert [mask is None for mask in masks[:: model.config.layers]] == [False, told, told, False]
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0], model.hidden(tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_in_pieces_are_those_of_one_product(monkeypatch):
    model = random_model("llama", tied=False)  # V = 59
    hidden = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    whole = model.logits(hidden)
    monkeypatch.setattr("teamtr_min.engine.model.HEAD_PIECE", 11)
    torch.testing.assert_close(model.logits(hidden), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_a_later_token(family):
    model = random_model(family)
    tokens = random_tokens(model, 1, 23)
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % model.config.vocab_size
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(after[:13], before[:13], atol=1e-5, rtol=0)
    assert ((after - before).abs().amax(-1) > 1e-3)[13:].all()  # and every later one does see it
    padded = model(torch.nn.functional.pad(tokens, (0, 6), value=7))[0]
    torch.testing.assert_close(padded[:23], before, atol=1e-5, rtol=0)


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


@each_model
def test_bf16_models_give_fp32_logits_that_are_near_the_exact_ones(family, tied):
    model = random_model(family, tied)
    tokens = random_tokens(model, 2, LONG)
    exact = model(tokens)
    model = model.bfloat16()
    hidden, logits = model.hidden(tokens), model(tokens)
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    product = hidden.double() @ model.head.double().t()
    torch.testing.assert_close(logits.double(), product, atol=1e-5, rtol=1e-5)  # never rounded to bf16
    assert (logits - exact).square().mean().sqrt() / exact.std() < 0.05


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
