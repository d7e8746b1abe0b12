"""Hidden states x output head -> log-prob of the sampled tokens, without [tokens, vocabulary] in memory.

    z = hidden @ weight^T / temperature          (N, V), only ever a block of rows at a time
    logp[t] = z[t, target[t]] - logsumexp(z[t])

The product and everything after it are fp32. Work: 2 N H V FLOPs forward; backward recomputes z and makes
both gradients, 6 N H V more.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ELEMENTS = 2**25  # most logits at once: 128 MiB of fp32


class TokenStats(NamedTuple):
    logp: Tensor  # (N,) fp32
    entropy: Tensor | None  # (N,) fp32, nats, no gradient
    kl: Tensor | None  # (N,) fp32, KL(old || this) over the whole vocabulary, nats, no gradient


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, H), weight (V, H), targets (N,) int64 -> log-probs (N,) fp32 at `temperature`."""
    return linear_logprob_stats(hidden, weight, targets, temperature).logp


def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    old: tuple[Tensor, Tensor] | None = None,
) -> TokenStats:
    """`linear_logprob` and, from the same logits, the entropy and the exact KL from an old policy.

    `old` is that policy's (hidden (N, H), weight (V, H)).
    """
    old_hidden, old_weight = (None, None) if old is None else old
    rows = max(1, BLOCK_ELEMENTS // weight.shape[0])
    blocks = []
    for lo in range(0, max(len(hidden), 1), rows):
        part = slice(lo, lo + rows)
        arguments = (hidden[part], weight, targets[part], temperature, entropy)
        arguments += (None if old is None else old_hidden[part], old_weight)
        if len(hidden) > rows and torch.is_grad_enabled():
            blocks.append(checkpoint(_block, *arguments, use_reentrant=False))  # keeps no logits for backward
        else:
            blocks.append(_block(*arguments))
    return TokenStats(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks)))


def _block(hidden, weight, targets, temperature, entropy, old_hidden, old_weight) -> TokenStats:
    logits = (hidden.float() @ weight.float().t()) / temperature  # (n, V)
    logp = logits.log_softmax(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]  # (n,)
    with torch.no_grad():
        spread = -(logp.exp() * logp).sum(-1) if entropy else None
        kl = None
        if old_hidden is not None:
            old_logp = ((old_hidden.float() @ old_weight.float().t()) / temperature).log_softmax(-1)
            kl = (old_logp.exp() * (old_logp - logp)).sum(-1)
    return TokenStats(chosen, spread, kl)
