"""Host and device never mix: whole runs of models that lie on device `meta`, which needs no GPU."""

import collections
import importlib
import itertools
import sys

import pytest
import torch
from tiny import CONFIGS
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import train
from kernels import decode, layer, trust_region
from teamtr_min.config import Config
from teamtr_min.engine import decode as engine_decode
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.sampler import Sampler
from teamtr_min.tasks import Relay

aten = torch.ops.aten
SIZES = {"device": "meta", "agents": 2, "stages": 1, "problems": 1, "group": 2, "inner_steps": 1}
SIZES |= {"eval_problems": 2, "max_new_tokens": 2}
MODULES = ("kernels.linear_logprob", "teamtr_min.engine.decode")  # which have the name of a function beside


class Elsewhere(TorchDispatchMode):
    """A tensor on `meta` has no numbers. What the host reads of it is `value`, or true. `moves` counts what
    goes from one to the other, by the file of ours that asks for it. An operation on both is an error."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value, self.moves = value, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        x, to = tensors[0] if tensors else None, kwargs.get("device")
        if func in (aten._local_scalar_dense.default, aten.nonzero.default) and x.is_meta:
            self.count("read")
            if func == aten._local_scalar_dense.default:
                return x.dtype == torch.bool or self.value
        if func == aten._to_copy.default and to is not None and to.type != x.device.type:
            self.count("read" if x.is_meta else "sent")
            read = torch.full(x.shape, self.value, dtype=kwargs.get("dtype") or x.dtype)
            return read if x.is_meta else func(*args, **kwargs)
        if len({t.device.type for t in tensors if t.dim() or t.is_meta}) == 2:
            assert func == aten.copy_.default, f"{func} mixes host and device"
            self.count("sent" if x.is_meta else "read")
            return x if x.is_meta else x.fill_(self.value)
        return func(*args, **kwargs)

    def count(self, kind: str) -> None:
        frame = sys._getframe()
        while frame and not frame.f_globals["__name__"].startswith(("teamtr_min", "kernels", "train")):
            frame = frame.f_back
        self.moves[kind, frame.f_globals["__name__"]] += 1 if frame else 0


@pytest.fixture(params=["torch", "kernels"])
def elsewhere(request, monkeypatch):
    """Runs with references, and with kernels that are not started."""
    returns = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(Relay, "grade", lambda *_: next(returns))
    if request.param == "kernels":
        parts = trust_region, layer, decode, *map(importlib.import_module, MODULES), kernels
        for part in parts:
            monkeypatch.setattr(part, "start", lambda *_, **options: None, raising=False)
            monkeypatch.setattr(part, "use_triton", lambda x: x.is_meta, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield request.param


@pytest.mark.parametrize("value, flags", [
    (0.0, {"occupancy": "corrected", "diagnostics": True}),
    (1.0, {"dtype": "bf16", "inner_steps": 2}),  # a KL of 1: each update is taken back
    (0.0, {"dtype": "bf16", "lora_rank": 2, "warm_start": 1, "occupancy": "joint"}),
])  # fmt: skip
def test_a_run_mixes_no_tensors_of_host_and_device(value, flags, elsewhere, tmp_path):
    config = Config(out=str(tmp_path / "run"), **SIZES | flags)
    with Elsewhere(value) as mode:
        summary = train.train(config)
    assert summary["return_final"] is not None and (summary["tokens_trained"] > 0) == (value == 0)
    assert ("read", "teamtr_min.learner") in mode.moves


def test_the_host_reads_nothing_while_messages_grow(elsewhere):
    model, moves = Transformer(CONFIGS["qwen3"]).to("meta"), []
    for most in (2, 5):
        sampler = Sampler(model)
        sampler.start(3)
        sampler.check_every = 16  # as on a GPU
        with Elsewhere() as mode:
            sampler.generate([0, 1, 2], [[1, 2], [3], [4, 5, 6]], [7, 8, 9], most, 1.0, [5])
        moves.append(mode.moves)
    assert moves[0] == moves[1] and moves[0]["read", "teamtr_min.engine.sampler"] > 0


def test_a_step_is_recorded_once_for_each_model_and_number_of_rows(elsewhere, monkeypatch, tmp_path):
    if elsewhere == "torch":
        pytest.skip("graphs are recorded of kernels alone")
    made, init = collections.Counter(), engine_decode.Decode.__init__

    def record(step, pool):
        made[id(step.func.__self__.model), len(step.args[0])] += 1
        return step, pool

    monkeypatch.setattr(engine_decode, "record", record)
    recording = lambda self, *a: init(self, *a) or setattr(self, "records", True)  # noqa: E731
    monkeypatch.setattr(engine_decode.Decode, "__init__", recording)
    with Elsewhere():
        train.train(Config(out=str(tmp_path / "run"), **SIZES | {"stages": 2}))
    assert len(made) == 2 and set(made.values()) == {1}, "two models, always two rows"
