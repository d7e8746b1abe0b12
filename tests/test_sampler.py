"""What is sampled depends on the model, the key and the position, not on the cache or the batch."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from tiny import each_model, random_model, random_tokens

from teamtr_min import generate, load_model
from teamtr_min.engine import rng
from teamtr_min.engine.decode import Decode
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.sampler import Completion, Sampler
from teamtr_min.files import UserError
from teamtr_min.hf.weights import RELAY

END = 1
PROMPTS = [[2, 11, 14, 12, 1, 3], [2, 5, 15, 6, 16, 7, 14, 9, 1, 3], [2, 1, 3]]
PROMPTS += [[2, 4, 14, 4, 1, 2, 17, 8, 1, 3], [2, 12, 15, 12, 15, 12, 1, 3]]


@pytest.fixture(scope="module")
def relay():
    return load_model(RELAY)


@pytest.fixture
def fed(monkeypatch):
    """The shapes of all that the model is fed, by whole passes or by decode steps of a token each."""
    shapes, hidden, decode = [], Transformer.hidden, Decode.hidden

    def count(call, shape):
        return lambda self, tokens, *args: shapes.append(shape(tokens)) or call(self, tokens, *args)

    monkeypatch.setattr(Transformer, "hidden", count(hidden, lambda tokens: tuple(tokens.shape)))
    monkeypatch.setattr(Decode, "hidden", count(decode, lambda tokens: (len(tokens), 1)))
    return shapes


def sampler_of(model, rows: int) -> Sampler:
    sampler = Sampler(model)
    sampler.start(rows)
    return sampler


def keys(count: int, start: int = 0) -> list[int]:
    return [rng.key(0, "test", start + r) for r in range(count)]


@torch.no_grad()
def plainly(model, prompt: list[int], key: int, limit: int, temperature: float, stops) -> Completion:
    """One message by a forward pass over the whole text for each token, and a draw by definition."""
    uniforms, tokens, logprobs = rng.uniforms([key], limit)[0].tolist(), [], []
    while len(tokens) < limit and not (tokens and tokens[-1] in stops):
        logits = model(torch.tensor([prompt + tokens]))[0, -1].double()  # (V,)
        logp = (logits / (temperature or 1)).log_softmax(0)
        passed, u = logp.exp().cumsum(0), uniforms[len(tokens)]
        assert temperature == 0 or (passed - u).abs().min() > 1e-6, "rounding decides: take another seed"
        token = int(logits.argmax()) if temperature == 0 else int((passed <= u).sum())
        tokens.append(token)
        logprobs.append(logp[token].item())
    return Completion(tokens, logprobs, tokens[-1] in stops)


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert [(c.tokens, c.stopped) for c in found] == [(c.tokens, c.stopped) for c in expected]
    for a, b in zip(found, expected):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@each_model
@pytest.mark.parametrize("check_every, budget", [(1, 16384), (4, 30), (16, 1)])
def test_turns_of_a_collection_are_those_of_a_plain_sampling_loop(family, tied, check_every, budget):
    """Rows left out or in another order; a host that rarely looks at what has ended; small prefills."""
    model = random_model(family, tied)
    sampler = Sampler(model)
    sampler.check_every, sampler.prefill_tokens = check_every, budget
    for rows in (3, 9):
        sampler.start(rows)
        texts = [random_tokens(model, 4 + r % 4 * (rows == 9), seed=r % 5).tolist() for r in range(rows)]
        turns = [range(rows), [2, 0], [1], range(rows - 1, -1, -1), range(rows)]
        for turn, (chosen, temperature) in enumerate(zip(turns, (1.0, 1.0, 0.7, 0, 1.5))):
            prompts, told = [texts[r] for r in chosen], []
            ks, how = keys(len(chosen), 100 * turn + rows), (6, temperature, range(9))
            found = sampler.generate(chosen, prompts, ks, *how, told.append)
            assert_same(found, [plainly(model, p, k, *how) for p, k in zip(prompts, ks)])
            assert sum(told) == len(chosen), "each message is reported once"
            for r, c in zip(chosen, found):
                texts[r] = texts[r] + c.tokens + [2, 5, 1, 3][: 1 + (r + turn) % 4]
        assert 2 * sampler.cache.keys[:, 0, :, 0].numel() == model.config.kv_per_token
        sampler.finish()
        assert sampler.cache is None, "without graphs the memory is free between collections"


def test_a_completion_does_not_depend_on_the_other_prompts_and_ends_with_its_first_stop_id(relay):
    how = {"max_new_tokens": 12, "seed": 5, "stop_ids": {END}}
    batched = generate(relay, PROMPTS, **how)
    assert_same(batched, [generate(relay, [p], **how)[0] for p in PROMPTS])
    assert_same(batched[::-1], generate(relay, PROMPTS[::-1], **how))
    for c in batched:
        assert c.stopped == (c.tokens[-1] == END) and END not in c.tokens[:-1]
        assert len(c.logprobs) == len(c.tokens) and (c.stopped or len(c.tokens) == 12)
    again, other = (generate(relay, [PROMPTS[1]] * 16, 12, seed=seed) for seed in (5, 6))
    assert len({tuple(c.tokens) for c in again}) > 4, "equal prompts draw apart"
    assert [c.tokens for c in again] != [c.tokens for c in other]
    assert generate(relay, [], 12) == [] and generate(relay, [[2]], 0)[0].tokens == []


def test_finished_rows_leave_the_batch_and_a_turn_computes_only_what_the_cache_lacks(relay, fed):
    sampler = sampler_of(relay, 5)
    first = sampler.generate(range(5), PROMPTS, keys(5), 8, 1.0, [END])
    lengths, decoded = [len(c.tokens) for c in first], [rows for rows, width in fed if width == 1]
    assert decoded == [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert decoded[0] > decoded[-1]
    grown = [p + c.tokens + [2, 17, 8, 1, 3] + [4] * i for i, (p, c) in enumerate(zip(PROMPTS, first))]
    fed.clear()
    sampler.generate(range(5), grown, keys(5, 10), 8, 1.0, [END])
    assert fed[0] == (5, 1 + 5 + 4), "the last sampled token and what came since, nothing more"
    assert all(width == 1 for _, width in fed[1:])


def test_what_new_prompts_have_in_common_is_computed_once_and_passes_keep_their_bound(relay, fed):
    said = [[5, 6], [5, 6], [5, 7], [8]]
    prompts = [PROMPTS[0], *(PROMPTS[3] + message for message in said)] * 3
    sampler = sampler_of(relay, 15)
    whole = sampler.generate(range(15), prompts, keys(15), 8, 1.0, [END])
    distinct = {tuple(prompt[: t + 1]) for prompt in prompts for t in range(len(prompt))}
    assert math.prod(fed[0]) == len(distinct)
    fed.clear()
    sampler.start(15)
    sampler.prefill_tokens = 13
    assert_same(sampler.generate(range(15), prompts, keys(15), 8, 1.0, [END]), whole)
    passes = list(itertools.takewhile(lambda shape: shape[1] > 1, fed))
    assert len(passes) > 1 and all(math.prod(shape) <= 13 for shape in passes)


def test_a_prompt_that_cannot_be_continued_and_weights_that_are_no_numbers_are_refused(relay):
    sampler = sampler_of(relay, 1)
    (c,) = sampler.generate([0], [PROMPTS[0]], keys(1), 3, 1.0, [])
    with pytest.raises(ValueError, match="adds no token"):
        sampler.generate([0], [PROMPTS[0] + c.tokens[:-1]], keys(1), 3, 1.0, [])
    for temperature, stop in ((-1.0, 0), (1.0, -1)):
        with pytest.raises(ValueError, match="a temperature is at least 0"):
            generate(relay, [[2]], 3, temperature, stop_ids=[stop])
    with pytest.raises(UserError, match="could reach 513 tokens; the model has 512"):
        generate(relay, [[2] * 510, [2]], 3)
    broken = copy.deepcopy(relay)
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, PROMPTS, 12)


def philox(counter: int, key: int) -> int:
    """Philox-2x32-10 as its authors write it, on Python integers; returns the first output word."""
    left, right, k = counter & 0xFFFFFFFF, counter >> 32, key
    for _ in range(10):
        product = left * 0xD256D193
        left, right = (product >> 32) ^ k ^ right, product & 0xFFFFFFFF
        k = (k + 0x9E3779B9) & 0xFFFFFFFF
    return left


def test_uniforms_equal_philox_on_python_integers():
    """Which has the known answers that come with the Random123 library, for the first word."""
    assert (philox(0, 0), philox(2**64 - 1, 2**32 - 1)) == (0xFF1DAE59, 0x2C3F628B)
    keys = [0, 1, 2**63 + 12345, 2**64 - 1, rng.key(7, "rollout", 3)]
    words = [[philox(i | (key >> 32) << 32, key & 0xFFFFFFFF) for i in range(5)] for key in keys]
    assert rng.uniforms(keys, 5).tolist() == [[(word >> 8) * 2.0**-24 for word in row] for row in words]


def test_paths_do_not_collide():
    keys = {rng.key(*path) for path in itertools.product(range(3), "ab", range(20), range(20))}
    assert len(keys) == 3 * 2 * 20 * 20
    assert rng.key(0, "a", 12) != rng.key(0, "a", 1, 2)
    assert rng.key(np.int64(7), "a", np.int32(2)) == rng.key(7, "a", 2)
    path = rng.RngPath(0, "train", 1)
    assert len({path.key(kind, r, t) for kind in ("route", "rollout") for r in (0, 1) for t in (0, 1)}) == 8
