"""Eq. 10 and 11 from log-probs: message ratios, clipping, both KL estimates and their gradient, fused.

Per token x = logp - old_logp; per message its sum, the ratio w = exp(sum), the clipped surrogate, k1 = -sum x
and k3 = sum (e^x - 1 - x); per agent the means; and back to every token

    dL/dlogp = -(1/M) [ w A 1[unclipped, |sum x| <= 20] - beta (e^x - 1) 1[|x| <= 20] ]      (ratio "message")

teamtr_min.objective.teamtr_loss is the definition; objective.trust_region_loss chooses between it and the
kernels, and only the kernels are here. They are launch-bound: forward and backward each read 8 bytes of
log-probs and 8 of ids per token once and backward writes 4, 0.6 MB at 16,384 tokens, where a start costs
about 5 microseconds.

Forward: one program per message walks its tokens, then one per agent walks the messages, both in order.
Backward: one pass over the tokens. No atomics: the same bits in every run.
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
def _bound(x, low, high):
    """Clamp that lets NaN through, so that a diverged loss shows."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def _k3(x):
    """e^x - 1 - x; near 0, where that is all rounding, by its series x^2/2 (1 + x/3 (1 + x/4 (...)))."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(12):
        series = 1.0 + x * (1.0 / (14 - i)) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@jit
def _log_ratio(logp, old_logp, owner, t, inside):
    """Log-ratio of tokens t; 0 in ignored slots, whatever they hold."""
    valid = inside & (owner >= 0)
    return tl.load(logp + t, mask=valid, other=0.0) - tl.load(old_logp + t, mask=valid, other=0.0)


@jit
def trust_messages(
    logp, old_logp, message, bounds, advantage, agent, beta,  # (N,), (N,), (N,), (M + 1,), (M,), (M,), (A,)
    terms, slope, penalty,  # (6, M), (M,), (M,): see the stores
    M, agents, low, high, clip,
    LIMIT: tl.constexpr, RATIO: tl.constexpr, KL_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One message: its tokens lie in bounds[m]..bounds[m + 1], ignored slots among them."""
    m = tl.program_id(0)
    lo, hi = tl.load(bounds + m), tl.load(bounds + m + 1)
    dtype = logp.dtype.element_ty
    A = tl.load(advantage + m).to(dtype)
    zero = tl.zeros((BLOCK,), dtype)
    length, sum_x, sum_k3, sum_w, max_w, sum_clipped, sum_surrogate = zero, zero, zero, zero, zero, zero, zero
    for first in range(lo, hi, BLOCK):
        t = first + tl.arange(0, BLOCK)
        owner = tl.load(message + t, mask=t < hi, other=-1)
        x = _log_ratio(logp, old_logp, owner, t, t < hi)
        x = tl.where((owner >= 0) & (owner != m), float("nan"), x)  # ids do not ascend
        valid = (owner >= 0).to(dtype)
        bounded = _bound(x, -LIMIT, LIMIT)
        length += valid
        sum_x += x
        sum_k3 += _k3(bounded)
        if RATIO == "token":
            w = tl.exp(bounded) * valid
            sum_w += w
            max_w = tl.maximum(max_w, w)
            sum_clipped += tl.where(tl.abs(w - 1.0) > clip, valid, 0.0)
            whole, cut = w * A, _bound(w, low, high) * A
            sum_surrogate += tl.where(whole <= cut, whole, cut) * valid
    n = tl.maximum(tl.sum(length, 0), 1.0)
    total, k3 = tl.sum(sum_x, 0), tl.sum(sum_k3, 0)
    k1 = -total
    if KL_UNIT == "token":
        k1, k3 = k1 / n, k3 / n
    if RATIO == "token":
        surrogate, clipped = tl.sum(sum_surrogate, 0) / n, tl.sum(sum_clipped, 0) / n
        mean_w = tl.sum(sum_w, 0) / n
        top_w = tl.max(max_w, 0) + 0.0 * mean_w  # NaN if any ratio is; a maximum may drop it
        rise = A / n  # of the surrogate with a token's unclipped ratio
    else:
        if RATIO == "mean":
            total = total / n
        w = tl.exp(_bound(total, -LIMIT, LIMIT))
        whole, cut = w * A, _bound(w, low, high) * A
        surrogate = tl.where(whole <= cut, whole, cut)
        clipped = tl.where(tl.abs(w - 1.0) > clip, 1.0, 0.0)
        mean_w = w
        top_w = w
        # of the surrogate with each token's log-prob; inside the clip range `whole` and `cut` are one.
        rise = tl.where((whole <= cut) & (tl.abs(total) <= LIMIT), whole, 0.0)
        if RATIO == "mean":
            rise = rise / n
    a = tl.load(agent + m)
    weight = tl.load(beta + a, mask=(a >= 0) & (a < agents), other=float("nan")).to(dtype)
    tl.store(terms + m, k1)
    tl.store(terms + M + m, k3)
    tl.store(terms + 2 * M + m, clipped)
    tl.store(terms + 3 * M + m, mean_w)
    tl.store(terms + 4 * M + m, top_w)
    tl.store(terms + 5 * M + m, surrogate - weight * k3)
    tl.store(slope + m, rise)
    tl.store(penalty + m, weight / n if KL_UNIT == "token" else weight)


@jit
def trust_agents(terms, agent, bounds, stats, loss, M, N, agents, BLOCK: tl.constexpr):
    """One agent's stats, (6, A), from the messages' terms; program 0 sums the loss as well."""
    a = tl.program_id(0)
    dtype = terms.dtype.element_ty
    zero = tl.zeros((BLOCK,), dtype)
    count, k1, k3, clipped, mean_w, max_w, objective = zero, zero, zero, zero, zero, zero, zero
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        mine = (tl.load(agent + m, mask=m < M, other=-1) == a) & (m < M)
        count += mine.to(dtype)
        k1 += tl.load(terms + m, mask=mine, other=0.0)
        k3 += tl.load(terms + M + m, mask=mine, other=0.0)
        clipped += tl.load(terms + 2 * M + m, mask=mine, other=0.0)
        mean_w += tl.load(terms + 3 * M + m, mask=mine, other=0.0)
        max_w = tl.maximum(max_w, tl.load(terms + 4 * M + m, mask=mine, other=0.0))
        objective += tl.load(terms + 5 * M + m, mask=m < M, other=0.0)
    messages, sum_w = tl.sum(count, 0), tl.sum(mean_w, 0)
    n = tl.maximum(messages, 1.0)
    tl.store(stats + a, tl.sum(k1, 0) / n)
    tl.store(stats + agents + a, tl.sum(k3, 0) / n)
    tl.store(stats + 2 * agents + a, tl.sum(clipped, 0) / n)
    tl.store(stats + 3 * agents + a, sum_w / n)
    tl.store(stats + 4 * agents + a, tl.max(max_w, 0) + 0.0 * sum_w)
    tl.store(stats + 5 * agents + a, messages)
    if a == 0:
        whole = -tl.sum(objective, 0) / tl.maximum(M, 1)
        tl.store(loss, tl.where(tl.load(bounds + M) == N, whole, float("nan")))  # else an id is M or more


@jit
def trust_gradient(
    logp, old_logp, message, slope, penalty, upstream, gradient,  # (N,) x 3, (M,), (M,), (), (N,)
    N, M, low, high,
    LIMIT: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dlogp of a block of tokens, 0 in ignored slots."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.load(message + t, mask=t < N, other=-1)
    valid = (owner >= 0) & (owner < M)
    x = _log_ratio(logp, old_logp, owner, t, t < N)
    w = tl.exp(_bound(x, -LIMIT, LIMIT))
    rise = tl.load(slope + owner, mask=valid, other=0.0)
    free = tl.abs(x) <= LIMIT
    if RATIO == "token":
        rise = tl.where((w * rise <= _bound(w, low, high) * rise) & free, w * rise, 0.0)
    fall = tl.load(penalty + owner, mask=valid, other=0.0) * tl.where(free, w - 1.0, 0.0)
    scale = tl.load(upstream) / tl.maximum(M, 1)
    tl.store(gradient + t, tl.where(valid, (fall - rise) * scale, 0.0), mask=t < N)


class _TrustRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, old_logp, message, advantage, agent, beta, clip, ratio, kl_unit):
        N, M, agents = len(logp), len(advantage), len(beta)
        # An ignored slot takes the id before it, so ids ascend and a message is one stretch of slots.
        ids = message.cummax(0).values if N else message
        bounds = torch.searchsorted(ids, torch.arange(M + 1, device=ids.device))
        terms, slope, penalty = logp.new_empty(6, M), logp.new_empty(M), logp.new_empty(M)
        stats, loss = logp.new_empty(6, agents), logp.new_empty(())
        if M:
            start(
                trust_messages, M, logp, old_logp, message, bounds, advantage, agent, beta,
                terms, slope, penalty, M, agents, 1 - clip, 1 + clip, clip,
                LIMIT=LOG_RATIO_LIMIT, RATIO=ratio, KL_UNIT=kl_unit, BLOCK=BLOCK,
            )  # fmt: skip
        start(trust_agents, agents, terms, agent, bounds, stats, loss, M, N, agents, BLOCK=BLOCK)
        ctx.save_for_backward(logp, old_logp, message, slope, penalty)
        ctx.options = 1 - clip, 1 + clip, ratio
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        logp, old_logp, message, slope, penalty = ctx.saved_tensors
        low, high, ratio = ctx.options
        gradient = torch.empty_like(logp)
        if len(logp):
            start(
                trust_gradient, -(-len(logp) // BLOCK), logp, old_logp, message, slope, penalty, upstream,
                gradient, len(logp), len(slope), low, high, LIMIT=LOG_RATIO_LIMIT, RATIO=ratio, BLOCK=BLOCK,
            )  # fmt: skip
        return gradient, *[None] * 8


def trust_region_loss(
    logp: Tensor,
    old_logp: Tensor,
    message: Tensor,
    advantage: Tensor,
    *,
    agent: Tensor | None = None,
    n_agents: int = 1,
    clip: float = 0.2,
    beta: float | Tensor = 0.0,
    ratio: str = "message",
    kl_unit: str = "message",
) -> tuple[Tensor, dict[str, Tensor]]:
    """teamtr_min.objective.teamtr_loss, which documents arguments and results, by the kernels alone.

    They need one thing that it does not: the ids in `message` (N,) must ascend. Slots to ignore, -1, may
    stand anywhere and hold anything. An id out of order or past the last message, or an agent past the last,
    raises ValueError on a CPU; on CUDA, where looking would stall the stream, it makes the loss NaN.
    """
    if not runs_on(logp):
        raise ValueError(
            f"kernels.trust_region_loss {NEEDS}, and logp is on {logp.device}; "
            "teamtr_min.objective.trust_region_loss takes plain torch there"
        )
    if agent is None:
        agent = torch.zeros(len(advantage), dtype=torch.long, device=logp.device)
    if not isinstance(beta, Tensor):
        beta = torch.full((n_agents,), beta, dtype=logp.dtype, device=logp.device)
    beta = beta.expand(n_agents)
    _check(logp, old_logp, message, advantage, agent, beta, n_agents, ratio, kl_unit)
    others = (old_logp, message.long(), advantage, agent.long(), beta)
    others = (x.detach().contiguous() for x in others)
    loss, stats = _TrustRegion.apply(logp.contiguous(), *others, clip, ratio, kl_unit)
    return loss, dict(zip(STATS, stats))


def _check(logp, old_logp, message, advantage, agent, beta, n_agents, ratio, kl_unit) -> None:
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}; it must be message, mean or token")
    if kl_unit not in KL_UNITS:
        raise ValueError(f"kl_unit is {kl_unit!r}; it must be message or token")
    if n_agents < 1:
        raise ValueError(f"n_agents is {n_agents}; a team has at least one")
    per_token, per_message = logp.shape[:1], advantage.shape[:1]
    for names, tensors, shape in [
        (("logp", "old_logp", "message"), (logp, old_logp, message), per_token),
        (("advantage", "agent"), (advantage, agent), per_message),
    ]:
        for name, x in zip(names, tensors):
            if x.shape != shape or x.dim() != 1:
                raise ValueError(f"{name} is {tuple(x.shape)}; like {names[0]} it must be {tuple(shape)}")
            if x.device != logp.device:
                raise ValueError(f"logp is on {logp.device}, but {name} is on {x.device}")
    if logp.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logp must be float32 (or float64), not {logp.dtype}")
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
    if len(agent) and not (0 <= agent.min() and agent.max() < n_agents):
        raise ValueError(f"agent ids must be within 0..{n_agents - 1}")
