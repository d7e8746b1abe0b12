"""Eq. 10 and 11 from log-probs: message ratios, clipping, both KL estimates and their gradient, fused.

Per token x = logp - old_logp; per message its sum, the ratio w = exp(sum), the clipped surrogate, k1 = -sum x
and k3 = sum (e^x - 1 - x); per agent the means, weighted by the messages' weights v; and back to every token

    dL/dlogp = -(v / sum v) [ w A 1[not clipped, |sum x| <= 20] - beta (e^x - 1) 1[|x| <= 20] ]

for ratio "message"; "mean" divides the first term by the message's length, "token" has a w at every token.
teamtr_min.objective.teamtr_loss is the reference, in plain torch, and documents arguments and results.
N tokens, M messages, A agents. One program per message walks its tokens twice, then one per agent all
messages. No atomics: the same bits in every run. One launch costs more than all bytes of 16,384 tokens.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import jit, start, tl

LOG_RATIO_LIMIT = 20.0  # exp(20) is far inside fp32; a ratio beyond it is held there, without a gradient
LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
RATIOS, KL_UNITS = ("message", "mean", "token"), ("message", "token")
STATS = ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean", "ratio_max", "messages")
BLOCK = 256


@jit
def _clamp(x, low, high):  # lets NaN through, so that a diverged loss shows
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def _k3(x):
    """e^x - 1 - x. Near 0 that would be all rounding: there its series x^2/2 (1 + x/3 (1 + x/4 (...)))."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(12):
        series = 1.0 + x * (1.0 / (14 - i)) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@jit
def trust_messages(
    logp, old_logp, message, bounds,  # (N,) fp32, (N,) fp32, (N,) int64, (M + 1,) int64
    advantage, weight, agent, beta,  # (M,) fp32, (M,) fp32, (M,) int64, (A,) fp32
    terms, gradient,  # out: (8, M) fp32, see the stores; (N,) fp32 or None: dL/dlogp times the sum of weights
    M, A, clip, RATIO: tl.constexpr, KL_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One message. Its tokens lie in bounds[m]..bounds[m + 1], ignored slots among them."""
    m = tl.program_id(0)
    lo, hi = tl.load(bounds + m), tl.load(bounds + m + 1)
    gain, v, a = tl.load(advantage + m), tl.load(weight + m), tl.load(agent + m)
    n, total, k3 = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    mean_w, top_w, cut, surrogate = n, n, n, n
    for first in range(lo, hi, BLOCK):
        t = first + tl.arange(0, BLOCK)
        owner = tl.load(message + t, mask=t < hi, other=-1)
        valid = owner >= 0  # elsewhere x is 0, whatever the slot holds
        x = tl.load(logp + t, mask=valid, other=0.0) - tl.load(old_logp + t, mask=valid, other=0.0)
        x = tl.where(valid & (owner != m), float("nan"), x)  # the ids do not ascend
        one = valid.to(tl.float32)
        bounded = _clamp(x, -LIMIT, LIMIT)
        n += tl.sum(one, 0)
        total += tl.sum(x, 0)
        k3 += tl.sum(_k3(bounded), 0)
        if RATIO == "token":
            w = tl.exp(bounded) * one
            free, held = w * gain, _clamp(w, 1.0 - clip, 1.0 + clip) * gain
            mean_w += tl.sum(w, 0)
            top_w = tl.maximum(top_w, tl.max(w, 0))
            cut += tl.sum(tl.where(free > held, one, 0.0), 0)
            surrogate += tl.sum(tl.where(free > held, held, free) * one, 0)
    n = tl.maximum(n, 1.0)
    k1, penalty = -total, tl.load(beta + a, mask=(a >= 0) & (a < A), other=float("nan"))
    if KL_UNIT == "token":
        k1, k3 = k1 / n, k3 / n
    if RATIO == "token":
        mean_w, cut, surrogate, rise = mean_w / n, cut / n, surrogate / n, gain / n
    else:
        unit = n if RATIO == "mean" else 1.0
        total = total / unit
        mean_w = tl.exp(_clamp(total, -LIMIT, LIMIT))
        top_w = mean_w
        free, held = mean_w * gain, _clamp(mean_w, 1.0 - clip, 1.0 + clip) * gain
        cut, surrogate = tl.where(free > held, 1.0, 0.0), tl.where(free > held, held, free)
        rise = tl.where((free <= held) & (tl.abs(total) <= LIMIT), free, 0.0) / unit
    tl.store(terms + m, v * k1)
    tl.store(terms + M + m, v * k3)
    tl.store(terms + 2 * M + m, v * cut)
    tl.store(terms + 3 * M + m, v * mean_w)
    tl.store(terms + 4 * M + m, top_w + 0.0 * mean_w)  # NaN if any ratio is; a maximum may drop it
    tl.store(terms + 5 * M + m, 1.0)
    tl.store(terms + 6 * M + m, v)
    tl.store(terms + 7 * M + m, v * (surrogate - penalty * k3))
    if gradient is not None:
        rise *= v  # slope of the surrogate in a token's log-prob ("token": in its ratio)
        drag = v * penalty / (n if KL_UNIT == "token" else 1.0)  # factor of e^x - 1
        for first in range(lo, hi, BLOCK):
            t = first + tl.arange(0, BLOCK)
            valid = tl.load(message + t, mask=t < hi, other=-1) >= 0
            x = tl.load(logp + t, mask=valid, other=0.0) - tl.load(old_logp + t, mask=valid, other=0.0)
            moves, w, up = tl.abs(x) <= LIMIT, tl.exp(_clamp(x, -LIMIT, LIMIT)), rise
            if RATIO == "token":
                free, held = w * rise, _clamp(w, 1.0 - clip, 1.0 + clip) * rise
                up = tl.where((free <= held) & moves, free, 0.0)
            tl.store(gradient + t, drag * tl.where(moves, w - 1.0, 0.0) - up, mask=valid)


@jit
def trust_agents(
    terms, agent, bounds,  # (8, M), (M,), (M + 1,), as above
    stats, loss, mass,  # out: (6, A), (), () fp32; mass: the sum of all weights, or 1
    M, A, N, BLOCK: tl.constexpr,
):  # fmt: skip
    """One agent's stats from the messages' terms, in order; program 0 writes the loss as well."""
    a = tl.program_id(0)
    row, zero = tl.arange(0, 8), tl.zeros((8, BLOCK), tl.float32)
    own, most, every = zero, zero, zero
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        x = tl.load(terms + row[:, None] * M + m[None, :], mask=(m < M)[None, :], other=0.0)  # (8, BLOCK)
        mine = tl.load(agent + m, mask=m < M, other=-1) == a
        own += tl.where(mine[None, :], x, 0.0)
        most = tl.maximum(most, tl.where(mine[None, :], x, 0.0))
        every += x
    own, most, every = tl.sum(own, 1), tl.max(most, 1), tl.sum(every, 1)
    n = tl.sum(tl.where(row == 6, own, 0.0), 0)
    values = tl.where(row < 4, own / tl.where(n > 0.0, n, 1.0), tl.where(row == 4, most + 0.0 * own, own))
    tl.store(stats + row * A + a, values, mask=row < 6)
    if a == 0:
        n, objective = tl.sum(tl.where(row == 6, every, 0.0), 0), tl.sum(tl.where(row == 7, every, 0.0), 0)
        whole = -objective / tl.where(n > 0.0, n, 1.0)
        tl.store(loss, tl.where(tl.load(bounds + M) == N, whole, float("nan")))  # else an id is M or more
        tl.store(mass, tl.where(n > 0.0, n, 1.0))


class _TrustRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, old_logp, advantage, weight, beta, message, agent, clip, ratio, kl_unit):
        N, M, A = len(logp), len(advantage), len(beta)
        # An ignored slot takes the id before it, so ids ascend and a message is one stretch of slots.
        ids = message.cummax(0).values if N else message
        bounds = torch.searchsorted(ids, torch.arange(M + 1, device=ids.device))
        terms, stats, loss, mass = map(logp.new_empty, ((8, M), (6, A), (), ()))
        gradient = torch.zeros_like(logp) if ctx.needs_input_grad[0] else None
        start(
            trust_messages, M, logp, old_logp, message, bounds, advantage, weight, agent, beta,
            terms, gradient, M, A, clip, RATIO=ratio, KL_UNIT=kl_unit, BLOCK=BLOCK,
        )  # fmt: skip
        start(trust_agents, A, terms, agent, bounds, stats, loss, mass, M, A, N, BLOCK=BLOCK)
        ctx.save_for_backward(gradient, mass)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        gradient, mass = ctx.saved_tensors
        return gradient * (upstream / mass), *[None] * 9


def trust_region_loss(
    logp: Tensor, old_logp: Tensor, message: Tensor, advantage: Tensor, *,
    weight: Tensor | None = None, agent: Tensor | None = None, n_agents: int = 1,
    clip: float = 0.2, beta: float | Tensor = 0.0, ratio: str = "message", kl_unit: str = "message",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """teamtr_min.objective.teamtr_loss in fp32 by the kernels, on CUDA or in Triton's interpreter.

    logp (N,) carries the gradient. The ids in `message` (N,) must ascend; -1, to ignore, may stand anywhere.
    What does not fit raises ValueError, but wrong ids make the loss NaN: looking would stall the stream."""
    if ratio not in RATIOS or kl_unit not in KL_UNITS:
        raise ValueError(f"ratio is {ratio!r}, kl_unit {kl_unit!r}; must be of {RATIOS} and {KL_UNITS}")
    M = len(advantage)
    weight = advantage.new_ones(M) if weight is None else weight
    agent = message.new_zeros(M) if agent is None else agent
    beta = (beta if isinstance(beta, Tensor) else logp.new_full((), beta)).expand(n_agents)
    given = logp, old_logp, message, advantage, weight, agent
    flat = [x.shape for x in given] == [(logp.numel(),)] * 3 + [(M,)] * 3
    kinds = logp.dtype == torch.float32 and not (message.is_floating_point() or agent.is_floating_point())
    if not (flat and kinds and len({x.device for x in given}) == 1):
        shown = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in given)
        wanted = "float32 logp, old_logp and ids message, (N,); advantage, weight and ids agent, (M,)"
        raise ValueError(f"it takes {wanted}, on one device, not {shown}")
    floats = [x.detach().float().contiguous() for x in (old_logp, advantage, weight, beta)]
    ints = message.long().contiguous(), agent.long().contiguous()
    loss, stats = _TrustRegion.apply(logp.contiguous(), *floats, *ints, clip, ratio, kl_unit)
    return loss, dict(zip(STATS, stats))
