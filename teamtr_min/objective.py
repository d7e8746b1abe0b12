"""Eq. 9, 10 and 11 in plain torch: the definition that the fused kernel must match.

The trainable tokens of M messages are one flat list of N tokens; `message[t]` in 0..M-1 says whose token t
is, and -1 marks a slot to ignore, whatever it holds. Log-probs are at the sampling temperature: `logp` under
the policy being trained (pi_new), `old_logp` under the one that wrote the messages (pi_old).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.trust_region import KL_UNITS, LOG_RATIO_LIMIT, RATIOS


def group_advantages(
    returns: Tensor, clip: float = math.inf, eps_norm: float = 1e-6, normalise: bool = True,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 9 [paper]: returns (P, G) of G rollouts for each of P problems -> advantages (P, G).

    Mean and variance are the population's. `weight` (P, G), at least 0, makes them weighted within each group
    [ours]; only the ratios of a group's weights count. Without `normalise` advantages stay in units
    of the return, only centred and clipped. A group of equal returns is exactly 0: tested as max == min,
    since in floating point the mean of equal numbers need not be that number. Rollouts do not count there
    whose share of the weight is lost in rounding."""
    weight = torch.ones_like(returns) if weight is None else weight
    share = weight / weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)  # (P, G)
    centred = returns - (share * returns).sum(dim=1, keepdim=True)
    sigma = ((share * centred.square()).sum(dim=1, keepdim=True) + eps_norm).sqrt()
    counts = share > torch.finfo(share.dtype).eps
    largest = returns.where(counts, -math.inf).amax(dim=1, keepdim=True)
    constant = largest <= returns.where(counts, math.inf).amin(dim=1, keepdim=True)
    scaled = centred / sigma if normalise else centred
    return torch.where(constant, 0.0, scaled.clamp(-clip, clip))


def teamtr_loss(
    logp: Tensor, old_logp: Tensor, message: Tensor, advantage: Tensor, *,
    weight: Tensor | None = None, agent: Tensor | None = None, n_agents: int = 1, clip: float = 0.2,
    beta: float | Tensor = 0.0, ratio: str = "message", kl_unit: str = "message",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Eq. 10 [paper], to be minimised, and Eq. 11's monitor beside it.

        loss = -sum_m v_m [ min(w_m A_m, clip(w_m, 1 - eps, 1 + eps) A_m) - beta KL_m ] / sum_m v_m

    logp (N,) carries the gradient; old_logp (N,), message (N,) int64, advantage (M,), weight (M,), agent (M,)
    int64 do not. `weight` is v [ours], at least 0; None counts every message once. beta is a number
    or (A,), one per agent. `ratio`: w_m is the product over the message's tokens ("message"), its geometric
    mean ("mean"), or stands at every token, whose clipped terms are averaged over the message ("token"). KL_m
    is the k3 form, because k1's gradient does not vanish at the old policy; a sum over the message's tokens,
    or their mean for kl_unit="token". Log-ratios are clamped to +-20, where their gradient ends.

    Returns (loss, stats); stats are (A,) tensors without gradient. Means over an agent's messages, weighted
    by v (0 where the weights sum to 0): `kl_k1` and `kl_k3` (nats per kl_unit), `clip_fraction` (share of
    terms whose gradient the clip cuts: A > 0 and w > 1 + eps, or A < 0 and w < 1 - eps), `ratio_mean`.
    Without weights: `ratio_max`, and `messages`, their number."""
    if ratio not in RATIOS or kl_unit not in KL_UNITS:
        raise ValueError(f"ratio is {ratio!r}, kl_unit {kl_unit!r}; must be of {RATIOS} and {KL_UNITS}")
    M = len(advantage)
    agent = torch.zeros(M, dtype=torch.long, device=logp.device) if agent is None else agent
    weight = logp.new_ones(M) if weight is None else weight.to(logp.dtype)
    valid = message >= 0
    owner = torch.where(valid, message, M)  # ignored slots go to a spare message past the end
    log_ratio = torch.where(valid, logp, 0.0) - torch.where(valid, old_logp, 0.0)  # (N,), masked before exp

    def per_message(x: Tensor) -> Tensor:
        """Sum tokens (N,) into their messages (M,)."""
        return x.new_zeros(M + 1).index_add(0, owner, x)[:M]

    length = per_message(torch.ones_like(log_ratio)).clamp(min=1)  # (M,)
    if ratio == "token":
        w = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()  # (N,)
        surrogate, cut = _clipped(w, F.pad(advantage, (0, 1))[owner], clip)  # (N,)
        surrogate, cut, mean_w = (per_message(x) / length for x in (surrogate, cut, w))  # (M,)
        max_w = w.new_zeros(M + 1).scatter_reduce(0, owner, w, "amax")[:M]
    else:
        total = per_message(log_ratio)  # (M,)
        total = total / length if ratio == "mean" else total
        w = total.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()  # (M,)
        surrogate, cut = _clipped(w, advantage, clip)
        mean_w, max_w = w, w

    unit = length if kl_unit == "token" else torch.ones_like(length)
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k1 = -per_message(log_ratio) / unit  # Eq. 11 [paper]
    k3 = per_message(bounded.expm1() - bounded) / unit  # [ours] r - 1 - log r >= 0, with k1's expectation
    penalty = torch.as_tensor(beta, dtype=logp.dtype, device=logp.device).expand(n_agents)[agent]  # (M,)
    loss = -_mean_of_sums((weight * (surrogate - penalty * k3)).sum(), weight.sum())

    def per_agent(x: Tensor) -> Tensor:
        """Sum messages (M,) over each agent's own (A,)."""
        return logp.new_zeros(n_agents).index_add(0, agent, x)

    with torch.no_grad():
        means = {"kl_k1": k1, "kl_k3": k3, "clip_fraction": cut, "ratio_mean": mean_w}  # (M,) each
        total = per_agent(weight)
        stats = {name: _mean_of_sums(per_agent(weight * x), total) for name, x in means.items()}
        stats["ratio_max"] = logp.new_zeros(n_agents).scatter_reduce(0, agent, max_w, "amax")
        stats["messages"] = per_agent(torch.ones_like(weight))
    return loss, stats


def _clipped(w: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The pessimistic surrogate min(w A, clip(w) A), and 1 where the clip has stopped it, 0 elsewhere."""
    free = w * advantage
    surrogate = torch.minimum(free, w.clamp(1 - clip, 1 + clip) * advantage)
    return surrogate, (surrogate < free).to(w)


def _mean_of_sums(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, and 0 where there is no weight."""
    return total / torch.where(weight > 0, weight, 1.0)
