"""Eq. 10 and 11 from log-probs: message ratios, clipping, both KL estimates and their gradient, fused.

Per token x = logp - old_logp; per message its sum, the ratio w = exp(sum), the clipped surrogate, k1 = -sum x
and k3 = sum (e^x - 1 - x); per agent the means, weighted by the messages' weights v; and back to every token

    dL/dlogp = -(v / sum v) [ w A 1[not clipped, |sum x| <= 20] - beta (e^x - 1) 1[|x| <= 20] ]

for ratio "message"; "mean" divides the first term by the message's length, "token" has a w at every token.
The definition in plain torch is teamtr_min.objective.teamtr_loss, which also documents arguments and results;
teamtr_min.objective.trust_region_loss chooses between the two.

Shapes: N tokens, M messages, A agents. The kernels are launch-bound: forward and backward each read 8 bytes
of log-probs and 8 of ids per token once, and backward writes 4. That is 0.6 MB at 16,384 tokens (0.2
microseconds at 3 TB/s) and about 40 FLOPs a token, where one launch costs about 5 microseconds.

Forward: one program per message walks its tokens, then one program per agent walks all messages, both in
order. Backward: one pass over the tokens. No atomics: the same bits in every run.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import NEEDS, jit, runs_on, start, tl

LOG_RATIO_LIMIT = 20.0  # exp(20) is far inside fp32; a ratio beyond it is held there, without a gradient
RATIOS, KL_UNITS = ("message", "mean", "token"), ("message", "token")
STATS = ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean", "ratio_max", "messages")
BLOCK = 256


@jit
def _clamp(x, low, high):
    """A clamp that lets NaN through, so that a diverged loss shows."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def _k3(x):
    """e^x - 1 - x. Near 0 that would be all rounding: there its series x^2/2 (1 + x/3 (1 + x/4 (...)))."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(12):
        series = 1.0 + x * (1.0 / (14 - i)) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@jit
def _log_ratio(logp, old_logp, t, valid):
    """Log-ratio of tokens t; 0 in ignored slots, whatever they hold."""
    return tl.load(logp + t, mask=valid, other=0.0) - tl.load(old_logp + t, mask=valid, other=0.0)


@jit
def _positive(total):
    """A sum of weights as a divisor: 1 where there is no weight."""
    return tl.where(total > 0.0, total, 1.0)


@jit
def trust_messages(
    logp, old_logp, message, bounds,  # (N,) fp32, (N,) fp32, (N,) int64, (M + 1,) int64
    advantage, weight, agent, beta,  # (M,) fp32, (M,) fp32, (M,) int64, (A,) fp32
    terms,  # (8, M) fp32, out: see the stores
    M, A, clip,
    LIMIT: tl.constexpr, RATIO: tl.constexpr, KL_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One message. Its tokens lie in bounds[m]..bounds[m + 1], ignored slots among them."""
    m = tl.program_id(0)
    lo, hi = tl.load(bounds + m), tl.load(bounds + m + 1)
    gain = tl.load(advantage + m)
    zero = tl.zeros((BLOCK,), tl.float32)
    length, sum_x, sum_k3, sum_w, max_w, sum_cut, sum_surrogate = zero, zero, zero, zero, zero, zero, zero
    for first in range(lo, hi, BLOCK):
        t = first + tl.arange(0, BLOCK)
        owner = tl.load(message + t, mask=t < hi, other=-1)
        x = _log_ratio(logp, old_logp, t, owner >= 0)
        x = tl.where((owner >= 0) & (owner != m), float("nan"), x)  # the ids do not ascend
        one = tl.where(owner >= 0, 1.0, 0.0)
        bounded = _clamp(x, -LIMIT, LIMIT)
        length += one
        sum_x += x
        sum_k3 += _k3(bounded)
        if RATIO == "token":
            w = tl.exp(bounded) * one
            free, held = w * gain, _clamp(w, 1.0 - clip, 1.0 + clip) * gain
            sum_w += w
            max_w = tl.maximum(max_w, w)
            sum_cut += tl.where(free > held, one, 0.0)
            sum_surrogate += tl.where(free > held, held, free) * one
    n = tl.maximum(tl.sum(length, 0), 1.0)
    total, k3 = tl.sum(sum_x, 0), tl.sum(sum_k3, 0)
    k1 = -total
    if KL_UNIT == "token":
        k1, k3 = k1 / n, k3 / n
    if RATIO == "token":
        surrogate, cut, mean_w = tl.sum(sum_surrogate, 0) / n, tl.sum(sum_cut, 0) / n, tl.sum(sum_w, 0) / n
        top_w = tl.max(max_w, 0) + 0.0 * mean_w  # NaN if any ratio is; a maximum may drop it
        slope = gain / n
    else:
        if RATIO == "mean":
            total = total / n
        w = tl.exp(_clamp(total, -LIMIT, LIMIT))
        free, held = w * gain, _clamp(w, 1.0 - clip, 1.0 + clip) * gain
        surrogate = tl.where(free > held, held, free)
        cut = tl.where(free > held, 1.0, 0.0)
        mean_w = w
        top_w = w
        slope = tl.where((free <= held) & (tl.abs(total) <= LIMIT), free, 0.0)
        if RATIO == "mean":
            slope = slope / n
    a = tl.load(agent + m)
    penalty = tl.load(beta + a, mask=(a >= 0) & (a < A), other=float("nan"))
    objective = surrogate - penalty * k3
    if KL_UNIT == "token":
        penalty = penalty / n
    v = tl.load(weight + m)
    tl.store(terms + m, v * k1)
    tl.store(terms + M + m, v * k3)
    tl.store(terms + 2 * M + m, v * cut)
    tl.store(terms + 3 * M + m, v * mean_w)
    tl.store(terms + 4 * M + m, top_w)
    tl.store(terms + 5 * M + m, v * objective)
    tl.store(terms + 6 * M + m, v * slope)  # of the surrogate in a token's log-prob ("token": in its ratio)
    tl.store(terms + 7 * M + m, v * penalty)  # of e^x - 1 in the gradient


@jit
def trust_agents(
    terms, weight, agent, bounds,  # as above
    stats, loss, mass,  # (6, A), () and () fp32, out; mass is the sum of all weights
    M, A, N, BLOCK: tl.constexpr,
):  # fmt: skip
    """One agent's stats from the messages' terms, in order; program 0 sums the loss as well."""
    a = tl.program_id(0)
    zero = tl.zeros((BLOCK,), tl.float32)
    k1, k3, cut, mean_w, max_w = zero, zero, zero, zero, zero
    count, own, every, objective = zero, zero, zero, zero
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        mine = (tl.load(agent + m, mask=m < M, other=-1) == a) & (m < M)
        v = tl.load(weight + m, mask=m < M, other=0.0)
        k1 += tl.load(terms + m, mask=mine, other=0.0)
        k3 += tl.load(terms + M + m, mask=mine, other=0.0)
        cut += tl.load(terms + 2 * M + m, mask=mine, other=0.0)
        mean_w += tl.load(terms + 3 * M + m, mask=mine, other=0.0)
        max_w = tl.maximum(max_w, tl.load(terms + 4 * M + m, mask=mine, other=0.0))
        objective += tl.load(terms + 5 * M + m, mask=m < M, other=0.0)
        count += tl.where(mine, 1.0, 0.0)
        own += tl.where(mine, v, 0.0)
        every += v
    n, sum_w = _positive(tl.sum(own, 0)), tl.sum(mean_w, 0)
    tl.store(stats + a, tl.sum(k1, 0) / n)
    tl.store(stats + A + a, tl.sum(k3, 0) / n)
    tl.store(stats + 2 * A + a, tl.sum(cut, 0) / n)
    tl.store(stats + 3 * A + a, sum_w / n)
    tl.store(stats + 4 * A + a, tl.max(max_w, 0) + 0.0 * sum_w)
    tl.store(stats + 5 * A + a, tl.sum(count, 0))
    if a == 0:
        total = tl.sum(every, 0)
        whole = -tl.sum(objective, 0) / _positive(total)
        tl.store(loss, tl.where(tl.load(bounds + M) == N, whole, float("nan")))  # else an id is M or more
        tl.store(mass, total)


@jit
def trust_gradient(
    logp, old_logp, message, terms, mass,  # as above
    upstream, gradient,  # () and (N,) fp32
    N, M, clip,
    LIMIT: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dlogp of a block of tokens; 0 in ignored slots."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.load(message + t, mask=t < N, other=-1)
    valid = (owner >= 0) & (owner < M)
    x = _log_ratio(logp, old_logp, t, valid)
    moves = tl.abs(x) <= LIMIT
    w = tl.exp(_clamp(x, -LIMIT, LIMIT))
    rise = tl.load(terms + 6 * M + owner, mask=valid, other=0.0)
    if RATIO == "token":
        free, held = w * rise, _clamp(w, 1.0 - clip, 1.0 + clip) * rise
        rise = tl.where((free <= held) & moves, free, 0.0)
    fall = tl.load(terms + 7 * M + owner, mask=valid, other=0.0) * tl.where(moves, w - 1.0, 0.0)
    scale = tl.load(upstream) / _positive(tl.load(mass))
    tl.store(gradient + t, tl.where(valid, (fall - rise) * scale, 0.0), mask=t < N)


class _TrustRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, old_logp, message, advantage, weight, agent, beta, clip, ratio, kl_unit):
        N, M, A = len(logp), len(advantage), len(beta)
        # An ignored slot takes the id before it, so ids ascend and a message is one stretch of slots.
        ids = message.cummax(0).values if N else message
        bounds = torch.searchsorted(ids, torch.arange(M + 1, device=ids.device))
        terms, stats = logp.new_empty(8, M), logp.new_empty(6, A)
        loss, mass = logp.new_empty(()), logp.new_empty(())
        if M:
            start(
                trust_messages, M, logp, old_logp, message, bounds, advantage, weight, agent, beta, terms,
                M, A, clip, LIMIT=LOG_RATIO_LIMIT, RATIO=ratio, KL_UNIT=kl_unit, BLOCK=BLOCK,
            )  # fmt: skip
        start(trust_agents, A, terms, weight, agent, bounds, stats, loss, mass, M, A, N, BLOCK=BLOCK)
        ctx.save_for_backward(logp, old_logp, message, terms, mass)
        ctx.clip, ctx.ratio = clip, ratio
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        logp, *_, terms, _ = ctx.saved_tensors
        N, gradient = len(logp), torch.empty_like(logp)
        if N:
            start(
                trust_gradient, -(-N // BLOCK), *ctx.saved_tensors, upstream, gradient,
                N, terms.shape[1], ctx.clip, LIMIT=LOG_RATIO_LIMIT, RATIO=ctx.ratio, BLOCK=BLOCK,
            )  # fmt: skip
        return gradient, *[None] * 9


def trust_region_loss(
    logp: Tensor,
    old_logp: Tensor,
    message: Tensor,
    advantage: Tensor,
    *,
    weight: Tensor | None = None,
    agent: Tensor | None = None,
    n_agents: int = 1,
    clip: float = 0.2,
    beta: float | Tensor = 0.0,
    ratio: str = "message",
    kl_unit: str = "message",
) -> tuple[Tensor, dict[str, Tensor]]:
    """teamtr_min.objective.teamtr_loss in fp32 by the kernels, on CUDA or in Triton's interpreter.

    logp (N,) carries the gradient. The kernels need one thing more than the definition: the ids in `message`
    (N,) must ascend; slots to ignore, -1, may stand anywhere and hold anything. An id out of order or past
    the last message, an agent past the last or a negative weight raises ValueError on a CPU. On CUDA, where
    looking would stall the stream, wrong ids make the loss NaN.
    """
    M = len(advantage)
    weight = advantage.new_ones(M) if weight is None else weight
    agent = message.new_zeros(M) if agent is None else agent
    beta = (beta if isinstance(beta, Tensor) else logp.new_full((), beta)).expand(n_agents)
    _check(logp, old_logp, message, advantage, weight, agent, n_agents, ratio, kl_unit)
    floats = (x.detach().float().contiguous() for x in (old_logp, advantage, weight, beta))
    old_logp, advantage, weight, beta = floats
    message, agent = message.long().contiguous(), agent.long().contiguous()
    loss, stats = _TrustRegion.apply(
        logp.contiguous(), old_logp, message, advantage, weight, agent, beta, clip, ratio, kl_unit
    )
    return loss, dict(zip(STATS, stats))


def _check(logp, old_logp, message, advantage, weight, agent, n_agents, ratio, kl_unit) -> None:
    if not runs_on(logp):
        raise ValueError(f"kernels.trust_region_loss {NEEDS}, and logp is on {logp.device}")
    if ratio not in RATIOS or kl_unit not in KL_UNITS:
        raise ValueError(f"ratio is {ratio!r}, kl_unit {kl_unit!r}; must be of {RATIOS} and {KL_UNITS}")
    per_token = {"logp": logp, "old_logp": old_logp, "message": message}
    per_message = {"advantage": advantage, "weight": weight, "agent": agent}
    for tensors, shape in ((per_token, logp.shape[:1]), (per_message, advantage.shape[:1])):
        for name, x in tensors.items():
            if x.shape != shape or x.device != logp.device:
                here, wanted = f"{tuple(x.shape)} on {x.device}", f"{tuple(shape)} on {logp.device}"
                raise ValueError(f"{name} is {here}; it must be {wanted}")
    if logp.dtype != torch.float32:
        raise TypeError(f"logp must be float32, not {logp.dtype}")
    for name, x in (("message", message), ("agent", agent)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int64 ids, not {x.dtype}")
    if logp.is_cuda:
        return
    ids = message[message >= 0]
    if (ids.diff() < 0).any():
        raise ValueError("message ids must ascend, apart from the -1 of slots to ignore")
    if len(ids) and ids[-1] >= len(advantage):
        raise ValueError(f"message id {int(ids[-1])} has no advantage; there are {len(advantage)} messages")
    if ((agent < 0) | (agent >= n_agents)).any():
        raise ValueError(f"agent ids must be within 0..{n_agents - 1}")
    if (weight < 0).any():
        raise ValueError("weights must not be negative")
