"""A decode step is one pass of the model over one token a row, whichever way it is computed."""

import copy
import functools
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
from teamtr_min.engine.model import KVCache
from teamtr_min.engine.sampler import Sampler, generate
from teamtr_min.hf.lora import Adapter, add_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # of what is of order 1
each_dtype = pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "bf16"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got, want, dtype, scale=1.0):
    torch.testing.assert_close(got.float(), want.float(), atol=scale * BOUND[dtype], rtol=BOUND[dtype])


def cached(model, lengths: list[int]) -> KVCache:
    cache = KVCache(model.config, len(lengths), 0, model.device, model.dtype)
    for row, length in enumerate(lengths):
        cache.reserve(max(lengths))
        tokens = random_tokens(model, 1, length, seed=row).to(model.device)
        model.hidden(tokens, cache, torch.tensor([row], device=model.device))
        cache.length[row] = length
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    "family, kind, dtype",
    [(family, "plain", dtype) for family in FAMILIES for dtype in BOUND] + [("qwen2", "lora", torch.float32)],
)
@pytest.mark.parametrize("lengths", [[7, 7, 7], [5, 1, 12, 9]], ids=["even", "ragged"])
def test_a_decode_step_is_a_pass_of_the_model(path, monkeypatch, family, kind, dtype, lengths):
    """Of the model by torch alone, whose layers have tests of their own."""
    by = os.environ["TEAMTR_KERNELS"]
    monkeypatch.setenv("TEAMTR_KERNELS", "torch")
    model = random_model(family).to(DEVICE, dtype)
    if kind == "lora":
        model = add_lora(model, Adapter("", "", rank=2, alpha=4.0))
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(0.3 * random(*p.shape, dtype=dtype))
    exact = copy.deepcopy(model).double()
    factor = 2 if DEVICE == "cuda" or path == "torch" else 4  # the interpreter cuts off where a GPU rounds
    caches = [cached(m, lengths) for m in (model, model, exact)]
    live = len(lengths) - 1  # the last row of the cache has no part in it
    for step in range(2):
        token = random_tokens(model, live, seed=step).to(DEVICE)
        start = lengths[0] + step if len(set(lengths)) == 1 else None
        for cache in caches:
            cache.reserve(max(lengths) + 2 if start is None else start + 1, start)
        with monkeypatch.context() as this_way:
            this_way.setenv("TEAMTR_KERNELS", by)
            got = decode.Decode(model, caches[0]).hidden(token)
        plain, want = (
            m.hidden(token[:, None], cache, slice(0, live))[:, 0]
            for m, cache in zip((model, exact), caches[1:])
        )
        assert got.dtype == dtype and error(got, want) <= factor * error(plain, want) + 1e-6
        for cache in caches:
            cache.length[:live] += 1
    for b in range(live):
        for kind in ("keys", "values"):
            got, plain, want = (getattr(cache, kind)[:, b, :, : lengths[b] + 2] for cache in caches)
            assert error(got, want) <= factor * error(plain, want) + 1e-6


def error(got, want) -> float:
    return (got.double() - want).abs().mean().item()


def recording(work, pool):
    """What decode.record does, on a machine without CUDA: the work is done again each time."""
    results = work()

    def again():
        for kept, new in zip(results, work()):
            kept.copy_(new)
        return results

    return again


@pytest.mark.parametrize("slots", [5, 2])
def test_recorded_steps_sample_what_plain_ones_do(launches, monkeypatch, slots):
    """Buckets of rows, some of them live and some not; several turns; a router that leaves rows out."""
    model = random_model("qwen2", layers=1).to(DEVICE)
    prompts = [random_tokens(model, n, seed=n).tolist() for n in (3, 9, 4, 5, 2)]
    stops, keys = [1, 2, 3, 4, 5, 6], list(range(100, 105))

    def turns(sampler: Sampler) -> list:
        texts, said = [list(p) for p in prompts], []
        for turn, rows in enumerate(([0, 1, 2, 3, 4], [2, 4], [0, 1, 3])):
            now = sampler.generate(
                rows, [texts[r] for r in rows], [k + 10 * turn for k in keys][: len(rows)], 7, 1.0, stops
            )
            for r, c in zip(rows, now):
                texts[r] += [*c.tokens, 8, 9]
            said += [c.tokens for c in now]
        return said

    if DEVICE == "cpu":
        monkeypatch.setattr(decode, "record", recording)
        monkeypatch.setattr(decode, "new_pool", object)
    monkeypatch.setenv("TEAMTR_KERNELS", "torch")
    plain = turns(Sampler(model, 5))
    monkeypatch.setenv("TEAMTR_KERNELS", "triton")
    sampler = Sampler(model, 5, slots)
    sampler.decode.graphs = sampler.decode.graphs or decode.Graphs(slots, model.device)
    sampler.check_every = 2
    assert turns(sampler) == plain
    assert 1 < len({len(tokens) for tokens in plain}), "all messages are equally long: nothing left the batch"
    assert len(sampler.decode.graphs.recorded) > 1


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
    step.graphs = None
    with torch.inference_mode():
        step.next(token, torch.rand(2, device=DEVICE), 1.0)
        launches.clear()
        for module in (kernels, layer):
            monkeypatch.setattr(module, "start", lambda kernel, *a, **k: launches.update([kernel.__name__]))
        with Started() as by_torch:
            step.next(token, torch.rand(2, device=DEVICE), 1.0)
    views = "t view _unsafe_view as_strided slice select detach split chunk alias".split()
    views += "empty new_empty empty_like".split()
    names = {name: count for name, count in by_torch.names.items() if name not in views}
    assert sum(launches.values()) == 28 * 5 + 1 + 1
    assert sum(launches.values()) + sum(names.values()) < 300


def test_a_sampler_that_is_dropped_frees_its_cache_at_once(launches, monkeypatch):
    """No cycle keeps it until the collector comes: the memory is the next agent's."""
    model = random_model("llama", layers=1).to(DEVICE)
    if DEVICE == "cpu":
        monkeypatch.setattr(decode, "record", lambda work, pool: functools.partial(tuple, work()))
        monkeypatch.setattr(decode, "new_pool", object)
    sampler = Sampler(model, 2)
    sampler.decode.graphs = sampler.decode.graphs or decode.Graphs(2, model.device)
    sampler.generate([0, 1], [[1, 2], [3, 4, 5]], [7, 8], 3, 1.0, [])
    kept = weakref.ref(sampler.cache)
    gc.disable()
    try:
        del sampler
        assert kept() is None
    finally:
        gc.enable()


def test_generate_takes_no_other_way(launches):
    model = random_model("llama").to(DEVICE)
    generate(model, [[1, 2, 3], [4]], 4)
    names = {"rms_norm_forward", "decode_attend", "decode_merge", "swiglu_forward", "decode_draw"}
    assert names <= set(launches)
