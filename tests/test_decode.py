"""A decode step is one pass of the model over one token a row, whichever way it is computed."""

import copy

import pytest
import torch
from tiny import FAMILIES, adapted, random_model, random_tokens

from teamtr_min.engine import decode
from teamtr_min.engine.cache import KVCache, Step
from teamtr_min.engine.sampler import Sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]
CASES.append(("lora", torch.float32))


def cached(model, lengths: list[int]) -> KVCache:
    cache = KVCache(model, len(lengths))
    for row, length in enumerate(lengths):
        tokens = random_tokens(model, 1, length, seed=row).to(model.device)
        model.hidden(tokens, Step.after(cache, slice(row, row + 1), length, length))
        cache.length[row] = length
    return cache


def error(got, want) -> float:
    return (got.double() - want).abs().mean().item()


@torch.no_grad()
@pytest.mark.parametrize("family, dtype", CASES)
@pytest.mark.parametrize("lengths", [[7, 7, 7], [5, 1, 12, 9]], ids=["even", "ragged"])
def test_a_decode_step_is_a_pass_of_the_model(path, monkeypatch, family, dtype, lengths):
    """It errs no more than the model by torch alone does, against the model in float64."""
    monkeypatch.setenv("TEAMTR_KERNELS", "torch")
    lora = family == "lora"
    model = random_model("qwen2" if lora else family).to(DEVICE, dtype)
    model = adapted(model, rank=2) if lora else model
    exact = copy.deepcopy(model).double()
    factor = 2 if DEVICE == "cuda" or path == "torch" else 4  # the interpreter cuts off where a GPU rounds
    caches = [cached(m, lengths) for m in (model, model, exact)]
    live = len(lengths) - 1  # the last row of the cache has no part in it
    rows, even = slice(0, live), len(set(lengths)) == 1
    for n in range(2):
        token = random_tokens(model, live, seed=n).to(DEVICE)
        span = max(lengths[:live]) + n + 1
        caches[0].reserve(span)
        with monkeypatch.context() as this_way:
            this_way.setenv("TEAMTR_KERNELS", path)
            got = decode.Decode(model, caches[0]).hidden(token, span, even)
        steps = [Step.after(cache, rows, 1, span) for cache in caches[1:]]
        plain, want = (m.hidden(token[:, None], s)[:, 0] for m, s in zip((model, exact), steps))
        assert got.dtype == dtype and error(got, want) <= factor * error(plain, want) + 1e-6
        for cache in caches:
            cache.length[:live] += 1
    for b in range(live):
        for held in zip(*((cache.keys, cache.values) for cache in caches)):
            got, plain, want = (x[:, b, :, : lengths[b] + 2] for x in held)
            assert error(got, want) <= factor * error(plain, want) + 1e-6


@pytest.fixture
def recorded(monkeypatch, launches):
    """The (rows, temperature) of each recording. Without CUDA each replay does the step anew."""
    made, on_a_gpu = [], decode.record

    def record(step, pool):
        made.append((len(step.args[0]), step.args[2]))
        if DEVICE == "cuda":
            return on_a_gpu(step, pool)
        results = step()  # a recording does nothing, so this is undone
        step.func.__self__.cache.length[: len(step.args[0])] -= 1
        return lambda: [kept.copy_(new) for kept, new in zip(results, step())], pool

    monkeypatch.setattr(decode, "record", record)
    return made


def recording(model, rows: int) -> Sampler:
    sampler = Sampler(model)
    sampler.start(rows)
    sampler.decode.records, sampler.check_every = True, 2
    return sampler


def test_recorded_steps_sample_what_plain_ones_do_and_outlive_a_collection(recorded, monkeypatch):
    model = random_model("qwen2", layers=1).to(DEVICE)
    stops = [1, 2, 3, 4, 5, 6]

    def collection(sampler: Sampler) -> list:
        sampler.start(5)
        texts = [random_tokens(model, n, seed=n).tolist() for n in (3, 9, 4, 5, 2)]
        said = []
        for turn, rows in enumerate(([0, 1, 2, 3, 4], [2, 4], [0, 1, 3])):
            prompts, keys = [texts[r] for r in rows], [100 + 10 * turn + r for r in rows]
            for r, c in zip(rows, sampler.generate(rows, prompts, keys, 7, 1.0, stops)):
                texts[r] += [*c.tokens, 8, 9]
                said.append(c.tokens)
        sampler.finish()
        return said

    monkeypatch.setenv("TEAMTR_KERNELS", "torch")
    plain = collection(Sampler(model))
    monkeypatch.setenv("TEAMTR_KERNELS", "triton")
    sampler = recording(model, 5)
    assert collection(sampler) == plain
    assert len({len(tokens) for tokens in plain}) > 1, "all messages are equally long: nothing left the batch"
    assert len(set(recorded)) > 1 and sampler.cache is not None
    collection(sampler)  # the first one's cache has grown now and then
    recorded.clear()
    assert collection(sampler) == plain and not recorded, "a step is recorded once"
    sampler.start(5)
    sampler.generate([0], [random_tokens(model, 200).tolist()], [1], 3, 1.0, [])
    assert recorded, "the cache has grown, so graphs of the old one are gone"


def test_graphs_read_the_weights_as_they_are_and_sharded_models_have_none(recorded):
    model = random_model("llama", layers=1).to(DEVICE)
    sampler = recording(model, 2)
    before = [sampler.generate([r], [[3, 4]], [9], 8, 1.0, []) for r in (0, 1)]
    assert before[0] == before[1] and len(recorded) == 1
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    fresh = Sampler(model)
    for s in (sampler, fresh):
        s.start(2)
    after = sampler.generate([0], [[3, 4]], [9], 8, 1.0, [])
    assert before[0] != after == fresh.generate([0], [[3, 4]], [9], 8, 1.0, [])
    model.sharded = True
    assert not decode.Decode(model, sampler.cache).records
