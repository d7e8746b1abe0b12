"""One new token for each of the first rows of a cache: what `Transformer.hidden` computes for T = 1, faster.

A decode step does little work in many operations, so their number is what counts. Weights that meet the same
input are put side by side in memory and make one product; the product before it adds to the residual stream;
on CUDA six kernels (kernels/layer.py, kernels/decode.py) do the rest of a layer, and a whole step, draw
included, is one CUDA graph. Letters as in model.py.
"""

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from kernels import decode as decode_kernels
from kernels import use_triton
from kernels.decode import draw
from kernels.layer import rms_norm, rotate_reference, swiglu, swiglu_reference
from teamtr_min.engine.attention import attend_one
from teamtr_min.engine.model import (
    Block,
    CachedStep,
    KVCache,
    RMSNorm,
    Transformer,
    rope_table,
)


class Decode:
    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache, self.graphs, self.fused = model, cache, None, False
        self.reach = 0  # positions of `table`
        if model.sharded:
            return
        self.fused = use_triton(model.head)
        self.layers = [_layer(block, self.fused) for block in model.model.layers]
        self.norm = _norm(model.model.norm, self.fused)
        self.swiglu = swiglu if self.fused else swiglu_reference
        if self.fused and model.device.type == "cuda":
            self.graphs = Graphs(len(cache.length), model.device)

    def next(self, token: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Feed each row's last token, draw the next: token (B,) int64, uniform (B,) -> as `draw`.

        The first B rows of the cache grow by one; it must have been told to reserve it.
        """
        if self.graphs:
            return self.graphs.next(self, token, uniform, temperature)
        hidden = self.hidden(token)
        self.cache.length[: len(token)] += 1
        return draw(self.model.logits(hidden), uniform, temperature)

    def hidden(self, token: Tensor) -> Tensor:
        """Final hidden states (B, H)."""
        if self.model.sharded:
            return self.model.hidden(token[:, None], self.cache, slice(0, len(token)))[:, 0]
        attend = self._by_kernels(len(token)) if self.fused else self._by_torch(len(token))
        x = self.model.model.embed_tokens(token)  # (B, H)
        for number, layer in enumerate(self.layers):
            y = attend(number, layer, layer.qkv(layer.norm(x)))  # (B, Q * D)
            x = layer.add_o(x, y)
            x = layer.add_down(x, self.swiglu(layer.gate_up(layer.other_norm(x))))
        return self.norm(x)

    def _by_torch(self, B: int) -> Callable:
        """How a layer attends: (its number, it, qkv (B, (Q + 2K) * D)) -> (B, Q * D)."""
        c, step = self.model.config, CachedStep(self.cache, slice(0, B), 1)
        table = rope_table(c, 1 << self.cache.span.bit_length(), self.model.device, self.model.dtype)
        positions, mask = step.positions[:, 0], step.mask
        cos, sin = (x[positions] for x in table)  # (B or 1, 1, D)
        Q, K, D = c.heads, c.kv_heads, c.head_dim

        def attend(number: int, layer, qkv: Tensor) -> Tensor:
            heads = qkv.view(B, Q + 2 * K, D)
            turned = heads[:, : Q + K]
            if layer.head_norms:
                turned = torch.cat([norm(x) for norm, x in zip(layer.head_norms, turned.split([Q, K], 1))], 1)
            turned = rotate_reference(turned, cos, sin)
            k, v = step.write_then_read(number, turned[:, Q:, None], heads[:, Q + K :, None])
            return attend_one(turned[:, :Q].view(B, K, Q // K, D), k, v, mask)

        return attend

    def _by_kernels(self, B: int) -> Callable:
        """The same; a row at the end of the cache, which nobody wants any more, stays there."""
        c, cache = self.model.config, self.cache
        capacity = cache.keys.shape[3]
        at = cache.length[:B].clamp(max=capacity - 1)
        if self.reach != capacity:  # a graph needs the very same table again, which others may forget
            self.table = rope_table(c, 1 << capacity.bit_length(), self.model.device, self.model.dtype)
            self.reach = capacity

        def attend(number: int, layer, qkv: Tensor) -> Tensor:
            keys, values = cache.keys[number], cache.values[number]
            norms = [norm.weight for norm in layer.head_norms]
            return decode_kernels.attend_cached(qkv, *self.table, at, keys, values, norms, c.norm_eps)

        return attend


def sample_token_reference(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What `kernels.decode.draw` computes, one row and one token at a time, in float64."""
    tokens, logprobs = [], []
    for row, u in zip(logits.double(), uniform.double()):
        logp = (row / (temperature or 1.0)).log_softmax(0)  # (V,)
        token = int(row.argmax())
        if temperature != 0:
            token = next(v for v in range(len(row)) if u < logp[: v + 1].exp().sum() or v + 1 == len(row))
        tokens.append(token)
        logprobs.append(logp[token])
    return torch.tensor(tokens), torch.stack(logprobs).float()


class Graphs:
    """On CUDA: a step for 1, 2, 4, ... rows is recorded when it is first wanted, and from then on repeated.

    Rows that are past the live ones come along to the next power of two; their new keys and values lie where
    no query looks. The memory of all steps is one pool: what a step returns is copied before the next.
    """

    def __init__(self, rows: int, device: torch.device):
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.uniform = torch.zeros(rows, device=device)
        self.recorded: dict[tuple, Callable] = {}
        self.capacity, self.pool = 0, None

    def next(
        self, decode: Decode, token: Tensor, uniform: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        live, cache = len(token), decode.cache
        if self.capacity != cache.keys.shape[3]:  # it has grown, and is somewhere else
            self.recorded, self.capacity, self.pool = {}, cache.keys.shape[3], None
        rows = min(1 << (live - 1).bit_length(), len(self.token))

        def step() -> tuple[Tensor, Tensor]:
            hidden = decode.hidden(self.token[:rows])
            cache.length[:rows] += 1
            return draw(decode.model.logits(hidden), self.uniform[:rows], temperature)

        with torch.cuda.device(token.device if token.is_cuda else -1):
            self.token[:live], self.uniform[:live] = token, uniform
            if (rows, temperature) not in self.recorded:
                self.pool = self.pool or new_pool()
                self.recorded[rows, temperature] = record(step, self.pool)
                cache.length[:rows] -= 1  # what recording did once
            drawn, logprob = self.recorded[rows, temperature]()
            return drawn[:live].clone(), logprob[:live].clone()


def new_pool():
    return torch.cuda.graph_pool_handle()


@functools.lru_cache
def _aside(device: int) -> torch.cuda.Stream:
    """The one stream on which steps are recorded: libraries keep workspaces for each stream that they see."""
    return torch.cuda.Stream(device)


def record(work: Callable, pool) -> Callable:
    """Do work() once, and record what it starts on the current CUDA device; each call of the result starts
    that again, on the same memory, and returns the same tensors with new contents."""
    here, aside, graph = (
        torch.cuda.current_stream(),
        _aside(torch.cuda.current_device()),
        torch.cuda.CUDAGraph(),
    )
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        work()  # compiles kernels, and lets libraries ask for what they need
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            results = work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a broken recording; the first error says more
                graph.capture_end()
            raise
        graph.capture_end()
    here.wait_stream(aside)

    def again():
        graph.replay()
        return results

    return again


def _layer(block: Block, fused: bool) -> SimpleNamespace:
    """What a step needs of it, looked up once."""
    attention, mlp = block.self_attn, block.mlp
    return SimpleNamespace(
        norm=_norm(block.input_layernorm, fused),
        qkv=_product(attention.qkv_proj),
        head_norms=[attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else [],
        add_o=_added(attention.o_proj),
        other_norm=_norm(block.post_attention_layernorm, fused),
        gate_up=_product(mlp.gate_up_proj),
        add_down=_added(mlp.down_proj),
    )


def _norm(norm: RMSNorm, fused: bool) -> Callable[[Tensor], Tensor]:
    """On x (B, H)."""
    weight = norm.weight.detach()
    if fused:
        return lambda x: rms_norm(x, weight, norm.eps)
    if weight.dtype != torch.float32:
        return norm
    eps, share = torch.full((1, 1), norm.eps, device=weight.device), 1 / len(weight)

    def lean(x: Tensor) -> Tensor:
        """The same in fewer operations than the reference."""
        length = torch.linalg.vector_norm(x, 2, 1, True)  # (B, 1)
        return (x * torch.addcmul(eps, length, length, value=share).rsqrt_()).mul_(weight)

    return lean


def _product(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """x (B, H) -> its outputs."""
    if type(linear) is not nn.Linear:  # LoRA
        return linear
    weight, bias = linear.weight.detach().t(), linear.bias
    if bias is None:
        return lambda x: torch.mm(x, weight)
    return lambda x: torch.addmm(bias, x, weight)


def _added(linear: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) -> x + linear(y), in the place of x."""
    if type(linear) is not nn.Linear:
        return lambda x, y: x.add_(linear(y))
    weight = linear.weight.detach().t()
    return lambda x, y: x.addmm_(y, weight)
