"""One new token for each of the first rows of a cache: what `Transformer.hidden` computes for T = 1, faster.
On CUDA kernels do what a layer has beside products, and a whole step is a graph. Letters as in model.py."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import use_triton
from kernels.decode import attend_cached, draw
from kernels.layer import rotate_reference, swiglu, swiglu_reference
from teamtr_min.engine.cache import KVCache, Step, attend
from teamtr_min.engine.half import Product, in_fp16
from teamtr_min.engine.model import RMSNorm, Transformer, rope_table

Drawn = tuple[Tensor, Tensor]  # tokens (B,) int64 and their log-probs (B,) fp32


class Decode:
    """Decode steps of one model over one cache. On CUDA a step for 1, 2, 4, ... rows is recorded when it is
    first wanted, and replayed from then on. Rows behind the live ones come along up to the next power of two;
    their new keys and values lie where no query looks. Graphs share a pool of memory."""

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache, self.by_kernels = model, cache, use_triton(model.head)
        # Sharded weights are at other addresses each time that they are gathered.
        self.records = self.by_kernels and model.device.type == "cuda" and not model.sharded
        self.token = torch.zeros_like(cache.length)  # (rows,) what graphs read
        self.uniform = torch.zeros(len(cache.length), device=model.device)
        self.eps = torch.tensor(model.config.norm_eps, device=model.device)
        self.graphs: dict[tuple, Callable] = {}  # (rows, temperature) -> replay
        self.layers = [  # looked up once: a tiny model would spend a fifth of its time on that
            (b.input_layernorm, b.self_attn, b.self_attn.qkv_proj, b.self_attn.o_proj,
             b.post_attention_layernorm, b.mlp.gate_up_proj, b.mlp.down_proj)
            for b in model.model.layers
        ]  # fmt: skip
        self.pool, self.table, self.capacity = None, None, -1  # of the graphs; of `table`

    def next(self, token: Tensor, uniform: Tensor, temperature: float, span: int, even: bool) -> Drawn:
        """Feed each row's last token, draw the next: token (B,) int64, uniform (B,) -> as `draw`. The first B
        rows of the cache grow by one, to at most `span`, with `even` all of them to just that."""
        if not self.records:
            return self._step(token, uniform, temperature, span, even)
        if self.capacity != self.cache.capacity:  # the cache has grown, and is somewhere else
            self.graphs, self.pool = {}, None
        live = len(token)
        rows = min(1 << (live - 1).bit_length(), len(self.token))
        self.token[:live], self.uniform[:live] = token, uniform
        if (rows, temperature) in self.graphs:
            drawn = self.graphs[rows, temperature]()
        else:
            inputs = self.token[:rows], self.uniform[:rows], temperature, span, even
            step = functools.partial(self._step, *inputs)
            drawn = step()  # which also compiles kernels; recording a step does not do it
            self.graphs[rows, temperature], self.pool = record(step, self.pool)
        return drawn[0][:live].clone(), drawn[1][:live].clone()

    def _step(self, token: Tensor, uniform: Tensor, temperature: float, span: int, even: bool) -> Drawn:
        hidden = self.hidden(token, span, even)
        self.cache.length[: len(token)] += 1
        return draw(self.model.logits(hidden), uniform, temperature)

    def hidden(self, token: Tensor, span: int, even: bool) -> Tensor:
        """Final hidden states (B, H)."""
        decoder, B = self.model.model, len(token)
        attend = self._attend_by_kernels(B) if self.by_kernels else self._attend(B, span, even)
        silu = swiglu if self.by_kernels else swiglu_reference
        x = decoder.embed_tokens(token)  # (B, H)
        for layer, (norm, attention, qkv, out, other_norm, gate_up, down) in enumerate(self.layers):
            add_product(x, out, attend(layer, attention, qkv(self._norm(x, norm))))
            add_product(x, down, silu(gate_up(self._norm(x, other_norm))))
        return self._norm(x, decoder.norm)

    def _norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        if self.by_kernels or x.dtype != torch.float32:
            return norm(x)
        length = torch.linalg.vector_norm(x, 2, -1, True)  # the same in fewer operations
        inverse = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * inverse).mul_(norm.weight)

    def _attend(self, B: int, span: int, even: bool) -> Callable[[int, nn.Module, Tensor], Tensor]:
        """How a layer attends: its number, the layer, qkv (B, (Q + 2K) * D) -> (B, Q * D)."""
        c, step = self.model.config, Step.after(self.cache, slice(0, B), 1, span, even)
        table = rope_table(c, 1 << step.span.bit_length(), self.model.device, self.model.dtype)
        cos, sin = (x[step.positions] for x in table)  # (B or 1, 1, 1, D)
        Q, K, D = c.heads, c.kv_heads, c.head_dim

        def of_layer(layer: int, attention: nn.Module, qkv: Tensor) -> Tensor:
            heads = qkv.view(B, Q + 2 * K, 1, D)
            turned, v = heads[:, : Q + K], heads[:, Q + K :]
            if c.qk_norm:
                q, k = turned[:, :Q], turned[:, Q:]
                turned = torch.cat([self._norm(q, attention.q_norm), self._norm(k, attention.k_norm)], 1)
            turned = rotate_reference(turned, cos, sin)
            k, v = step.exchange(layer, turned[:, Q:], v)  # (B, K, S, D)
            return attend(turned[:, :Q], k, v, step.mask).view(B, Q * D)

        return of_layer

    def _attend_by_kernels(self, B: int) -> Callable[[int, nn.Module, Tensor], Tensor]:
        """The same. A row at the end of the cache is no live one."""
        c, cache = self.model.config, self.cache
        at = cache.length[:B].clamp(max=cache.capacity - 1)
        if self.capacity != cache.capacity:  # graphs read the very same table again
            self.table = rope_table(c, 1 << cache.capacity.bit_length(), self.model.device, self.model.dtype)
            self.capacity = cache.capacity

        def of_layer(layer: int, attention: nn.Module, qkv: Tensor) -> Tensor:
            kept = cache.keys[layer], cache.values[layer]
            norms = (attention.q_norm.weight, attention.k_norm.weight) if c.qk_norm else ()
            return attend_cached(qkv, *self.table, at, *kept, norms, c.norm_eps)

        return of_layer


def add_product(x: Tensor, linear: nn.Module, y: Tensor) -> None:
    """x += linear(y), (B, H); one operation where the layer has no adapter."""
    if type(linear) is Product and in_fp16(linear.weight) is None:
        x.addmm_(y, linear.weight.t())
    else:
        x.add_(linear(y))


def record(step: functools.partial, pool) -> tuple[Callable[[], tuple], object]:
    """Record the operations of step() without doing them. Returns a function that does them, with the same
    tensors for results, and the pool they lie in."""
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.device(step.args[0].device)  # else the stream is one of the current GPU
    with here, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = step()
    return lambda: graph.replay() or results, graph.pool()
