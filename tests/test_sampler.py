"""What is sampled depends on the model, the key and the position, not on the cache or the batch."""

import itertools
import math
import random

import pytest
import torch
from tiny import random_model

from kernels.decode import draw as sample_token
from teamtr_min import load_model
from teamtr_min.engine import rng
from teamtr_min.engine.decode import Decode, sample_token_reference
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.sampler import Sampler, generate
from teamtr_min.files import UserError
from teamtr_min.hf.weights import RELAY

END = 1
PROMPTS = [
    [2, 11, 14, 12, 1, 3],
    [2, 5, 15, 6, 16, 7, 14, 9, 1, 3],
    [2, 1, 3],
    [2, 4, 14, 4, 1, 2, 17, 8, 1, 3],
    [2, 12, 15, 12, 15, 12, 1, 3],
]


@pytest.fixture(scope="module")
def model():
    return load_model(RELAY)


@pytest.fixture
def fed(monkeypatch):
    """The shapes of all that the model is fed, by whole passes or by decode steps of a token each."""
    shapes, hidden, decode = [], Transformer.hidden, Decode.hidden
    monkeypatch.setattr(
        Transformer,
        "hidden",
        lambda self, t, *a, **k: shapes.append(tuple(t.shape)) or hidden(self, t, *a, **k),
    )
    monkeypatch.setattr(Decode, "hidden", lambda self, t: shapes.append((len(t), 1)) or decode(self, t))
    return shapes


def sample(model, prompts, seed=0, limit=12, temperature=1.0):
    return generate(model, prompts, limit, temperature, seed, [END])


def keys(count: int, start: int = 0) -> list[int]:
    return [rng.key(0, "test", start + r) for r in range(count)]


def take_turn(sampler: Sampler, prompts, keys, rows=None, limit=8, **options):
    rows = range(len(prompts)) if rows is None else rows
    return sampler.generate(rows, prompts, keys, limit, 1.0, [END], **options)


def assert_same(a, b) -> None:
    assert [(c.tokens, c.stopped) for c in a] == [(c.tokens, c.stopped) for c in b]
    for x, y in zip(a, b):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_logprob_is_that_of_a_plain_forward_pass(model, temperature):
    """Cached = uncached: after each prompt, over each sampled token, at the sampling temperature."""
    for prompt, c in zip(PROMPTS, sample(model, PROMPTS, 3, temperature=temperature)):
        logp = (model(torch.tensor([prompt + c.tokens]))[0] / temperature).log_softmax(-1)
        logp = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(c.tokens)[:, None])[:, 0]
        assert c.logprobs == pytest.approx(logp.tolist(), abs=1e-5)


def test_batched_equals_alone_equals_shuffled(model):
    batched = sample(model, PROMPTS, 5)
    assert_same(batched, [sample(model, [p], 5)[0] for p in PROMPTS])
    order = [3, 0, 4, 2, 1]
    assert_same([batched[i] for i in order], sample(model, [PROMPTS[i] for i in order], 5))
    assert len({tuple(c.tokens) for c in batched}) > 1


def test_repeated_prompts_draw_apart_and_seeds_differ(model):
    one, other = ([tuple(c.tokens) for c in sample(model, [PROMPTS[1]] * 16, seed)] for seed in (0, 1))
    assert len(set(one)) > 4 and one != other


def test_a_completion_ends_with_its_first_stop_id_or_at_the_limit(model):
    for limit in (1, 2, 12):
        for c in sample(model, PROMPTS, 2, limit):
            assert 1 <= len(c.tokens) <= limit and len(c.logprobs) == len(c.tokens)
            assert c.stopped == (c.tokens[-1] == END) and END not in c.tokens[:-1]
            assert c.stopped or len(c.tokens) == limit
    assert all(len(c.tokens) == 9 and not c.stopped for c in generate(model, PROMPTS, 9, 1.0))
    assert sample(model, []) == []
    assert [c.tokens for c in sample(model, PROMPTS[:2], limit=0)] == [[], []]


def test_temperature_zero_is_the_argmax(model):
    for prompt, c in zip(PROMPTS, generate(model, PROMPTS, 6, 0.0)):
        for t, (token, logprob) in enumerate(zip(c.tokens, c.logprobs)):
            logp = model(torch.tensor([prompt + c.tokens[:t]]))[0, -1].log_softmax(-1)
            assert token == logp.argmax() and logprob == pytest.approx(logp.max().item(), abs=1e-5)


def test_draws_follow_the_distribution():
    """A fine grid of uniforms must hit each token in proportion to its probability; impossible ones never."""
    logits = torch.tensor([0.3, -math.inf, 2.0, -1.0, 0.0, -math.inf])
    u = (torch.arange(20000) + 0.5) / 20000
    for temperature in (1.0, 0.7, 2.0):
        tokens, logp = sample_token(logits.expand(20000, -1), u, temperature)
        p = (logits / temperature).softmax(0)
        assert torch.allclose(torch.bincount(tokens, minlength=6) / 20000, p, atol=1e-4)
        assert torch.allclose(logp, p.log()[tokens], atol=1e-6)
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    assert sample_token(logits.expand(2, -1), ends, 1.0)[0].tolist() == [0, 4]


@pytest.mark.parametrize("rows", [1, 3, 17, 65])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_draw_is_that_of_the_reference(rows, temperature):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 301, generator=generator) * 4
    logits[:, ::7] = -math.inf
    uniform = torch.rand(rows, generator=generator)
    tokens, logp = sample_token(logits, uniform, temperature)
    expected, expected_logp = sample_token_reference(logits, uniform, temperature)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logp, expected_logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 17, 65])
def test_the_host_may_look_rarely(model, rows):
    """As on a GPU: finished rows go on until it looks, and what they drew then is nobody's."""
    prompts = [PROMPTS[i % 5] + [4] * (i % 3) for i in range(rows)]
    often = take_turn(Sampler(model, rows), prompts, keys(rows), limit=11)
    sampler = Sampler(model, rows)
    sampler.check_every = 4
    assert_same(often, take_turn(sampler, prompts, keys(rows), limit=11))
    grown = [p + c.tokens + [2, 5, 1, 3] for p, c in zip(prompts, often)]
    assert_same(
        take_turn(sampler, grown, keys(rows, 99)), take_turn(Sampler(model, rows), grown, keys(rows, 99))
    )


def test_finished_rows_leave_the_batch(model, fed):
    lengths = [len(c.tokens) for c in sample(model, PROMPTS * 4, 1)]
    decoded = [rows for rows, width in fed if width == 1]
    assert decoded == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


@pytest.mark.parametrize("slots, every", [(1, 1), (3, 1), (4, 3), (7, 16), (16, 1)])
def test_rows_that_wait_write_what_they_would_have_at_once(slots, every):
    """Over turns, some of whose rows still have their slot and some not, with leftovers of others there. By a
    model that leaves every token to its draw."""
    model = random_model("llama")
    sampler, whole = Sampler(model, 17, slots), Sampler(model, 17)
    sampler.check_every = every
    sequences, lengths, cut_off = [PROMPTS[r % 5] + [4] * (r % 3) for r in range(17)], [], []
    for turn, rows in enumerate([list(range(17)), [3, 16, 0, 9, 8, 2], list(range(16, -1, -1))]):
        now, ks = [sequences[r] for r in rows], keys(17, 100 * turn)[: len(rows)]
        waited, expected = (s.generate(rows, now, ks, 7, 2.0, range(9)) for s in (sampler, whole))
        assert_same(waited, expected)
        lengths += [len(c.tokens) for c in waited if c.stopped]
        cut_off += [c for c in waited if not c.stopped]
        for r, c in zip(rows, waited):
            sequences[r] = sequences[r] + c.tokens + [2, 5, 1, 3]
    assert len(set(lengths)) > 4 and cut_off
    assert len({token for c in waited for token in c.tokens}) > 15


def test_the_batch_stays_full_while_rows_wait(model, fed):
    rows, slots = 60, 8
    lengths = [len(c.tokens) for c in take_turn(Sampler(model, rows, slots), PROMPTS * 12, keys(rows))]
    decoded = [live for live, width in fed if width == 1]
    assert sum(decoded) == sum(lengths) - rows, "each token but the first is one row of one step"
    assert max(decoded) <= slots
    assert sum(live > slots - slots // 4 for live in decoded) > 0.7 * len(decoded)
    waves = sum(max(lengths[w : w + slots]) - 1 for w in range(0, rows, slots))
    assert len(decoded) < 0.75 * waves


def test_the_cache_survives_between_turns(model, fed):
    """Later turns compute only what is new, and sample what a new sampler would."""
    sampler = Sampler(model, 5)
    first = take_turn(sampler, PROMPTS, keys(5))
    grown = [p + c.tokens + [2, 17, 8, 1, 3] + [4] * i for i, (p, c) in enumerate(zip(PROMPTS, first))]
    fed.clear()
    second = take_turn(sampler, grown, keys(5, 10))
    assert fed[0][1] == 1 + 5 + 4, "a turn prefills the last sampled token and what came since, nothing more"
    assert_same(second, take_turn(Sampler(model, 5), grown, keys(5, 10)))


def test_a_turn_of_some_rows_equals_each_row_alone(model):
    """As a random router plays: subsets in any order, each row with a history of its own."""
    together, alone = Sampler(model, 5), [Sampler(model, 1) for _ in range(5)]
    sequences = list(PROMPTS)
    for turn, rows in enumerate([[3, 1], [0, 1, 4], [2], [4, 3, 2, 1, 0], [1, 4]]):
        ks = keys(len(rows), 100 * turn)
        batch = take_turn(together, [sequences[r] for r in rows], ks, rows)
        assert_same(batch, [take_turn(alone[r], [sequences[r]], [k])[0] for r, k in zip(rows, ks)])
        for r, c in zip(rows, batch):
            sequences[r] = sequences[r] + c.tokens + [2, 5, 1, 3]


def test_prefill_in_small_passes_changes_nothing_and_keeps_within_them(model, fed):
    whole = take_turn(Sampler(model, 5), PROMPTS, keys(5))
    fed.clear()
    assert_same(whole, take_turn(Sampler(model, 5), PROMPTS, keys(5), prefill_tokens=12))
    prefill = list(itertools.takewhile(lambda shape: shape[1] > 1, fed))
    assert len(prefill) > 1 and all(rows * width <= 12 for rows, width in prefill)


def test_what_new_prompts_have_in_common_is_computed_once(model, fed):
    """Such as a problem whose rollouts differ only in what the first agent said."""
    problem, said = PROMPTS[3], [[5, 6], [5, 6], [5, 7], [8]]
    prompts = [PROMPTS[0], *(problem + message for message in said)] * 3
    apart = [take_turn(Sampler(model, 1), [p], [k])[0] for p, k in zip(prompts, keys(15))]
    fed.clear()
    assert_same(take_turn(Sampler(model, 15), prompts, keys(15)), apart)
    distinct = {tuple(prompt[: t + 1]) for prompt in prompts for t in range(len(prompt))}
    assert fed[0][0] * fed[0][1] == len(distinct)


def test_a_sequence_that_adds_nothing_is_refused(model):
    sampler = Sampler(model, 1)
    (c,) = take_turn(sampler, [PROMPTS[0]], keys(1), limit=3)
    with pytest.raises(ValueError, match="adds none"):
        take_turn(sampler, [PROMPTS[0] + c.tokens[:-1]], keys(1))


def test_a_transcript_longer_than_the_models_positions_is_refused(model):
    with pytest.raises(UserError, match="510 tokens .* up to 3 exceed the 512 positions"):
        generate(model, [[2] * 510, [2]], 3, 1.0)


def test_weights_that_are_not_numbers_stop_the_sampler():
    broken = load_model(RELAY)
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(broken, PROMPTS)


def test_rows_that_outlive_the_longest_one_do_not_see_what_it_left():
    """Then all live rows may be equally long, and no mask hides what lies beyond them in the cache."""
    model, draw = random_model("llama"), random.Random(1)
    sampler, rows = Sampler(model, 3), [0, 1, 2]
    sequences = [[draw.randrange(50) for _ in range(draw.randint(5, 9))] for _ in rows]
    for turn in range(4):
        written = sampler.generate(rows, sequences, [100 * turn + row for row in rows], 7, 1.0, range(20))
        for row, completion in zip(rows, written):
            whole = sequences[row] + completion.tokens
            logps = model(torch.tensor([whole]))[0].log_softmax(-1)  # (T, V)
            at = range(len(sequences[row]), len(whole))
            expected = [logps[t - 1, whole[t]].item() for t in at]
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
            sequences[row] = whole + [draw.randrange(50) for _ in range(draw.randint(1, 4))]
