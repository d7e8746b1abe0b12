"""Eq. 9, 10 and 11 in plain torch: the definition that the fused kernel must match.

The trainable tokens of M messages are one flat list of N tokens; `message[t]` in 0..M-1 says whose token t
is, and -1 marks a slot to ignore, whatever it holds. Log-probs are at the sampling temperature, of the token
that was sampled: `logp` under the policy being trained (pi_new), `old_logp` under the one that wrote the
messages (pi_old).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.trust_region import LOG_RATIO_LIMIT


def group_advantages(
    returns: Tensor, clip: float = math.inf, eps_norm: float = 1e-6, normalise: bool = True
) -> Tensor:
    """Eq. 9 [paper]: returns (P, G) of G rollouts for each of P problems -> advantages (P, G).

    Without `normalise` they stay in units of the return, only centred and clipped.
    The deviation is the population's. A group of equal returns is exactly 0: tested as max == min, since in
    floating point the mean of equal numbers need not be that number.
    """
    centred = returns - returns.mean(dim=1, keepdim=True)
    sigma = (centred.square().mean(dim=1, keepdim=True) + eps_norm).sqrt()
    constant = returns.amax(dim=1, keepdim=True) == returns.amin(dim=1, keepdim=True)
    scaled = centred / sigma if normalise else centred
    return torch.where(constant, 0.0, scaled.clamp(-clip, clip))


def teamtr_loss(
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
    """Eq. 10 [paper], to be minimised, and Eq. 11's monitor beside it.

        loss = -(1/M) sum_m [ min(w_m A_m, clip(w_m, 1 - eps, 1 + eps) A_m) - beta KL_m ]

    logp (N,) carries the gradient; old_logp (N,), message (N,) int64, advantage (M,), agent (M,) int64 do
    not. beta is a number or (A,), one per agent. `ratio`: w_m is the product over the message's tokens
    ("message"), its geometric mean ("mean"), or stands at every token, whose clipped terms are averaged over
    the message ("token"). KL_m is the k3 form, because k1's gradient does not vanish at the old policy; a sum
    over the message's tokens, or their mean for kl_unit="token". Log-ratios are clamped to +-20, where their
    gradient ends.

    Returns (loss, stats); stats are (A,) tensors without gradient, means over an agent's messages (0 if it
    has none): `kl_k1` and `kl_k3` (nats per kl_unit), `clip_fraction` (share of ratios farther than eps from
    1), `ratio_mean`, `ratio_max`, `messages`.
    """
    M = len(advantage)
    agent = torch.zeros(M, dtype=torch.long, device=logp.device) if agent is None else agent
    valid = message >= 0
    owner = torch.where(valid, message, M)  # ignored slots go to a spare message past the end
    log_ratio = torch.where(valid, logp, 0.0) - torch.where(valid, old_logp, 0.0)  # (N,), masked before exp

    def per_message(x: Tensor) -> Tensor:
        """Sum tokens (N,) into their messages (M,)."""
        return x.new_zeros(M + 1).index_add(0, owner, x)[:M]

    length = per_message(torch.ones_like(log_ratio)).clamp(min=1)  # (M,)
    if ratio == "token":
        w = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()  # (N,)
        surrogate = per_message(_clipped(w, F.pad(advantage, (0, 1))[owner], clip)) / length  # (M,)
        clipped, mean_w = per_message(((w - 1).abs() > clip).to(w)) / length, per_message(w) / length
        max_w = w.new_zeros(M + 1).scatter_reduce(0, owner, w, "amax")[:M]
    elif ratio in ("message", "mean"):
        total = per_message(log_ratio)  # (M,)
        total = total / length if ratio == "mean" else total
        w = total.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()  # (M,)
        surrogate = _clipped(w, advantage, clip)
        clipped, mean_w, max_w = ((w - 1).abs() > clip).to(w), w, w
    else:
        raise ValueError(f"ratio is {ratio!r}; it must be message, mean or token")
    if kl_unit not in ("message", "token"):
        raise ValueError(f"kl_unit is {kl_unit!r}; it must be message or token")

    unit = length if kl_unit == "token" else torch.ones_like(length)
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k1 = -per_message(log_ratio) / unit  # Eq. 11 [paper]
    # [ours] r - 1 - log r: never negative, same expectation
    k3 = per_message(bounded.expm1() - bounded) / unit
    weight = torch.as_tensor(beta, dtype=logp.dtype, device=logp.device).expand(n_agents)[agent]  # (M,)
    loss = -(surrogate - weight * k3).sum() / max(M, 1)

    with torch.no_grad():
        messages = logp.new_zeros(n_agents).index_add(0, agent, torch.ones_like(length))

        def per_agent(x: Tensor) -> Tensor:
            """Mean of messages (M,) over each agent's own (A,)."""
            return logp.new_zeros(n_agents).index_add(0, agent, x.detach()) / messages.clamp(min=1)

        stats = {
            "kl_k1": per_agent(k1),
            "kl_k3": per_agent(k3),
            "clip_fraction": per_agent(clipped),
            "ratio_mean": per_agent(mean_w),
            "ratio_max": logp.new_zeros(n_agents).scatter_reduce(0, agent, max_w.detach(), "amax"),
            "messages": messages,
        }
    return loss, stats


def _clipped(w: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The pessimistic surrogate min(w A, clip(w) A)."""
    return torch.minimum(w * advantage, w.clamp(1 - clip, 1 + clip) * advantage)


def trust_region_loss(logp: Tensor, *others, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """teamtr_loss, by the fused kernel where TEAMTR_KERNELS and the device let it; what training calls.

    The kernel needs the message ids to ascend, as a batch has them.
    """
    loss_function = kernels.trust_region_loss if kernels.use_triton(logp) else teamtr_loss
    return loss_function(logp, *others, **options)
