"""A decode step is one pass of the model over one token a row, whichever way it is computed."""

import copy
import gc
import os
import weakref
from collections import Counter

import pytest
import torch
from tiny import FAMILIES, random_model, random_tokens

from kernels import decode as kernels
from kernels import layer
from teamtr_min.engine import decode
from teamtr_min.engine.cache import KVCache, Step
from teamtr_min.engine.sampler import Sampler, generate
from teamtr_min.hf.lora import Adapter, add_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)


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
@pytest.mark.parametrize(
    "family, kind, dtype",
    [(family, "plain", dtype) for family in FAMILIES for dtype in DTYPES]
    + [("qwen2", "lora", torch.float32)],
)
@pytest.mark.parametrize("lengths", [[7, 7, 7], [5, 1, 12, 9]], ids=["even", "ragged"])
def test_a_decode_step_is_a_pass_of_the_model(path, monkeypatch, family, kind, dtype, lengths):
    """It errs no more than the model by torch alone does, against the model in float64."""
    by = os.environ["TEAMTR_KERNELS"]
    monkeypatch.setenv("TEAMTR_KERNELS", "torch")
    model = random_model(family).to(DEVICE, dtype)
    if kind == "lora":
        model = add_lora(model, Adapter("", rank=2, alpha=4.0))
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
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
            this_way.setenv("TEAMTR_KERNELS", by)
            got = decode.Decode(model, caches[0]).hidden(token, span, even)
        plain, want = (
            m.hidden(token[:, None], Step.after(cache, rows, 1, span))[:, 0]
            for m, cache in zip((model, exact), caches[1:])
        )
        assert got.dtype == dtype and error(got, want) <= factor * error(plain, want) + 1e-6
        for cache in caches:
            cache.length[:live] += 1
    for b in range(live):
        for kind in ("keys", "values"):
            got, plain, want = (getattr(cache, kind)[:, b, :, : lengths[b] + 2] for cache in caches)
            assert error(got, want) <= factor * error(plain, want) + 1e-6


def again(step, pool):
    """What `decode.record` does, where there is no CUDA: each replay does the step anew."""
    results = step()  # a recording does nothing, so this is undone
    step.func.__self__.cache.length[: len(step.args[0])] -= 1

    def replay():
        for kept, new in zip(results, step()):
            kept.copy_(new)
        return results

    return replay, pool


@pytest.fixture
def recorded(monkeypatch, launches):
    """The (rows, temperature) of each recording, with `decode.record` itself on a GPU."""
    made, record = [], decode.record if DEVICE == "cuda" else again

    def counted(step, pool):
        made.append((len(step.args[0]), step.args[2]))
        return record(step, pool)

    monkeypatch.setattr(decode, "record", counted)
    return made


def recording(model, rows: int) -> Sampler:
    sampler = Sampler(model)
    sampler.start(rows)
    sampler.decode.records, sampler.check_every = True, 2
    return sampler


def test_recorded_steps_sample_what_plain_ones_do_and_outlive_a_collection(recorded, monkeypatch):
    """Buckets of rows, some of them live and some not; several turns; rows that are left out."""
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
    sampler.generate([0], [random_tokens(model, 60).tolist()], [1], 3, 1.0, [])
    assert recorded, "the cache has grown, so graphs of the old one are gone"


def test_graphs_read_the_weights_as_they_are_and_sharded_models_have_none(recorded):
    model = random_model("llama", layers=1).to(DEVICE)
    sampler = recording(model, 2)
    before = [sampler.generate([r], [[3, 4]], [9], 8, 1.0, []) for r in (0, 1)]
    assert before[0] == before[1] and len(recorded) == 1
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    sampler.start(2)
    after = sampler.generate([0], [[3, 4]], [9], 8, 1.0, [])
    fresh = Sampler(model)
    fresh.start(1)
    assert after != before[0] and after == fresh.generate([0], [[3, 4]], [9], 8, 1.0, [])
    model.sharded = True
    assert not decode.Decode(model, sampler.cache).records


def test_a_sampler_that_is_dropped_frees_its_cache_at_once(launches):
    """No cycle keeps it until the collector comes: the memory is the next agent's."""
    sampler = Sampler(random_model("llama", layers=1).to(DEVICE))
    sampler.start(2)
    sampler.generate([0, 1], [[1, 2], [3, 4, 5]], [7, 8], 3, 1.0, [])
    kept = weakref.ref(sampler.cache)
    gc.disable()
    try:
        del sampler
        assert kept() is None
    finally:
        gc.enable()


def test_a_step_of_qwen_starts_fewer_than_300_kernels(launches, monkeypatch):
    """As many layers as Qwen2.5-1.5B has, in a model that is narrow: what a graph of its step will hold."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Started(TorchDispatchMode):
        names = Counter()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names[op._schema.name.split("::")[1]] += 1
            return op(*args, **(kwargs or {}))

    model = random_model("qwen2", layers=28).to(DEVICE)
    with monkeypatch.context() as fast:
        fast.setenv("TEAMTR_KERNELS", "torch")
        cache = cached(model, [4, 6])
    cache.reserve(8)
    step, token = decode.Decode(model, cache), torch.tensor([1, 2], device=DEVICE)
    step.records, given = False, (token, torch.rand(2, device=DEVICE), 1.0, 8, False)
    with torch.inference_mode():
        step.next(*given)
        launches.clear()
        for module in (kernels, layer):
            monkeypatch.setattr(module, "start", lambda kernel, *a, **k: launches.update([kernel.__name__]))
        with Started() as by_torch:
            step.next(*given)
    views = "t view _unsafe_view as_strided slice select detach split chunk alias".split()
    views += "empty new_empty empty_like".split()
    names = {name: count for name, count in by_torch.names.items() if name not in views}
    assert sum(launches.values()) == 28 * 5 + 1 + 1
    assert sum(launches.values()) + sum(names.values()) < 300


def test_generate_takes_no_other_way(launches):
    generate(random_model("llama").to(DEVICE), [[1, 2, 3], [4]], 4)
    names = {"rms_norm_forward", "decode_attend", "decode_merge", "swiglu_forward", "decode_draw"}
    assert names <= set(launches)
