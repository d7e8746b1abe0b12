"""Stage-0: teach a newcomer the habits of the agent that it replaces, before the team works with it. [paper]

Probe contexts are the team's own rollouts. At each token of the incumbent's messages there, the newcomer is
drawn toward the policy nearest to itself that the team would hardly notice: [mechanism ours]

    pi_target ∝ pi_new^{1/(1+lam)} * pi_incumbent^{lam/(1+lam)},   KL(pi_target || pi_incumbent) <= delta

with the least lam >= 0 that does. Both are frozen in the target. The loss is KL(pi_target || newcomer),
summed over a message, averaged over messages. Where lam = 0 the newcomer is inside already and its target is
itself: it has nothing to learn there, but is held, since learning elsewhere would carry it away. [ours]

That takes one vocabulary for both. A newcomer with another learns the text of the incumbent's messages, by
next-token prediction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from teamtr_min.config import Config
from teamtr_min.engine.model import Transformer
from teamtr_min.learner import Diverged, Learner
from teamtr_min.rollout import AgentBatch, Rollouts
from teamtr_min.team import Agent, Message, Team

BISECTIONS = 24  # as finely as fp32 divides [0, 1]
CHUNK_NUMBERS = 2**24  # in one (tokens, V) tensor: 64 MiB, and about ten of them live at once
LR_FACTOR = 4  # on --lr, which is meant for returns: a target for every token says more than they do


def mixture(new: Tensor, incumbent: Tensor, weight: Tensor) -> Tensor:
    """log pi_target (N, V) from finite log-probs (N, V); weight (N,) is lam / (1 + lam), in [0, 1]."""
    return torch.lerp(new, incumbent, weight[:, None]).log_softmax(1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats (N,), of finite log-probs (N, V)."""
    return (p.exp() * (p - q)).sum(1)


def mixture_weight(new: Tensor, incumbent: Tensor, delta: float) -> Tensor:
    """The least weight (N,) whose mixture has KL(mixture || incumbent) <= delta: 0 where `new` is inside.

    The KL falls all the way from weight 0 to 1, so bisection finds it. [ours] bisects lam; its weight is the
    same search in an interval that ends. What is returned lies inside.
    """
    low = torch.zeros_like(new[:, 0])
    high = 1 - (kl_divergence(new, incumbent) <= delta).to(new)  # weight 1 is the incumbent; NaN is outside
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = kl_divergence(mixture(new, incumbent, middle), incumbent) <= delta
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return high


def share_vocabulary(a: Agent, b: Agent) -> bool:
    """Whether both write the same tokens under the same ids, and end a message with the same one."""
    one, other = (agent.tokenizer.backend.get_vocab(with_added_tokens=True) for agent in (a, b))
    return one == other and a.chat.end_of_message == b.chat.end_of_message


def align(rollouts: Rollouts, team: Team, j: int, config: Config) -> dict:
    """Train the newcomer, agent j of `team`, on rollouts of the team with the incumbent in its place.

    Takes `config.align` full-batch steps, none if the newcomer is inside everywhere. Returns what
    metrics.jsonl keeps. Raises Diverged when a loss or gradient is not finite.
    """
    learner, incumbent = Learner(team, [j], beta=0.0), rollouts.team.agents[j]
    model, none = learner.models[0], torch.zeros_like(rollouts.returns)  # no advantage is used here
    shared = share_vocabulary(incumbent, team.agents[j])
    written = rollouts if shared else in_tokens_of(team.agents[j], rollouts, j)
    batches = dataclasses.replace(written, team=team).batches([j], none, config.batch_tokens)
    if shared:
        pairs = incumbent.model, rollouts.batches([j], none, config.batch_tokens)
        terms, outside = mixture_terms(model, batches, *pairs, config)
    else:
        terms, outside = next_token_terms(model, batches, config.temperature)
    ranks = learner.ranks
    messages = max(1, ranks.total(sum(len(batch.advantage) for batch in batches)))
    outside = ranks.total(outside)
    terms = terms if outside else []  # what is inside has a term all the same, where anything is outside
    steps, losses = config.align if outside else 0, []
    learner.onload()
    try:
        for step in range(steps + 1):  # the last pass only measures
            training = step < steps
            losses.append(0.0)
            for term in terms:
                with torch.set_grad_enabled(training):
                    loss = term() / messages
                if training:
                    loss.backward()
                    learner.add_gradients()
                losses[-1] += loss.item()
            losses[-1] = ranks.total(losses[-1])
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss of the alignment is {losses[-1]}")
            if training:
                learner.step(LR_FACTOR * config.lr * config.lr_scales[j] * (1 - step / steps))
    finally:
        learner.offload()
    tokens = ranks.total(sum(len(batch.pair) for batch in batches))
    return {
        "shared_vocabulary": shared,
        "probes": messages,
        "outside": outside / max(1, tokens),
        "align_steps": steps,
        "align_loss_before": losses[0],
        "align_loss_after": losses[-1],
        "tokens_trained_replace": steps * tokens,
    }


def mixture_terms(
    model: Transformer,
    batches: list[AgentBatch],
    incumbent: Transformer,
    incumbent_batches: list[AgentBatch],
    config: Config,
) -> tuple[list[Callable[[], Tensor]], int]:
    """One loss per batch, and how many tokens are outside the radius.

    The two see a message in contexts of their own templates and in batches of their own order, so they are
    matched by message. What is frozen is kept as hidden states, on the host.
    """
    seen = {}  # (rollout, turn) -> the incumbent's hidden states of that message
    for batch in incumbent_batches:
        seen |= zip(places(batch), frozen_hidden(incumbent, batch).split(lengths(batch)))
    vocabulary = min(len(model.head), len(incumbent.head))  # past it one of them has padding
    heads = [head.detach()[:vocabulary].clone() for head in (model.head, incumbent.head)]
    terms, outside = [], 0  # one loss per batch; tokens
    for batch in batches:
        hidden = [frozen_hidden(model, batch), torch.cat([seen[place] for place in places(batch)])]  # (N, H)
        parts = chunks(len(batch.pair), vocabulary)
        weight = torch.cat(
            [mixture_weight(*both(hidden, part, heads, config.temperature), config.delta) for part in parts]
        )  # (N,)
        terms.append(functools.partial(mixture_loss, model, batch, weight, hidden, heads, config.temperature))
        outside += int(weight.count_nonzero())
    return terms, outside


def mixture_loss(
    model: Transformer,
    batch: AgentBatch,
    weight: Tensor,
    hidden: list[Tensor],
    heads: list[Tensor],
    temperature: float,
) -> Tensor:
    """Sum of KL(pi_target || model) over the tokens of a batch, with its graph.

    hidden and heads are the frozen newcomer's and the incumbent's, weight (N,) is the mixture's. Each chunk's
    (tokens, V) tensors are made again in the backward pass, so those of one chunk at a time are in memory.
    """

    def loss_of(now: Tensor, head: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = mixture(*both(hidden, part, heads, temperature), weight[part])
        return kl_divergence(target, log_probs(now, head, temperature)).sum()

    now, head = hidden_of(model, batch), model.head[: len(heads[0])]  # (N, H), (V, H)
    parts = chunks(len(now), len(head))
    return sum(checkpoint(loss_of, now[part], head, part, use_reentrant=False) for part in parts)


def next_token_terms(
    model: Transformer, batches: list[AgentBatch], temperature: float
) -> tuple[list[Callable[[], Tensor]], int]:
    """One loss per batch, minus the log-probs of its tokens added up; and how many tokens they have."""

    def loss_of(batch: AgentBatch) -> Tensor:
        logp = kernels.linear_logprob(batch.hidden(model), model.head, batch.targets, temperature)  # (pairs,)
        return -logp[batch.pair].sum()

    return [functools.partial(loss_of, b) for b in batches], sum(len(b.pair) for b in batches)


def in_tokens_of(newcomer: Agent, rollouts: Rollouts, j: int) -> Rollouts:
    """The same rollouts, with agent j's messages as the newcomer would write their text."""

    def rewritten(message: Message) -> Message:
        tokens = newcomer.chat.encode(message.text)
        tokens += [newcomer.chat.end_of_message] * message.stopped
        return dataclasses.replace(message, tokens=tokens, logprobs=[0.0] * len(tokens))

    messages = [[rewritten(m) if m.agent == j else m for m in one] for one in rollouts.messages]
    return dataclasses.replace(rollouts, messages=messages)


def hidden_of(model: Transformer, batch: AgentBatch) -> Tensor:
    """(N, H): what predicts each of the batch's tokens."""
    return batch.hidden(model)[batch.pair]


@torch.no_grad()
def frozen_hidden(model: Transformer, batch: AgentBatch) -> Tensor:
    return hidden_of(model, batch).cpu()


def log_probs(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """hidden (N, H), head (V, H) -> (N, V) fp32."""
    return (F.linear(hidden.float(), head.float()) / temperature).log_softmax(1)


def both(hidden: list[Tensor], part: slice, heads: list[Tensor], temperature: float) -> list[Tensor]:
    """Log-probs of one chunk under the newcomer as it came and under the incumbent."""
    return [log_probs(x[part].to(head.device), head, temperature) for x, head in zip(hidden, heads)]


def chunks(tokens: int, vocabulary: int) -> list[slice]:
    rows = max(1, CHUNK_NUMBERS // vocabulary)
    return [slice(first, first + rows) for first in range(0, tokens, rows)]


def places(batch: AgentBatch) -> list[tuple[int, int]]:
    """Rollout and turn of each of the batch's messages."""
    return list(zip(batch.rollout.tolist(), batch.turn.tolist()))


def lengths(batch: AgentBatch) -> list[int]:
    """Tokens of each of the batch's messages."""
    return torch.bincount(batch.message, minlength=len(batch.advantage)).tolist()
