"""A team's turns -> Rollouts -> the batches that one agent trains on."""

import functools
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from teamtr_min.engine import rng
from teamtr_min.engine.cache import Step
from teamtr_min.engine.distributed import halving
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.packing import Packed, Tree, batches_of, pack, trees_of
from teamtr_min.tasks.task import Message, Problem
from teamtr_min.team import Team

NOTHING = Tree([0], [0], [1], {})  # one token, of no rollout: a pass without effect


@dataclass(frozen=True)
class Rollouts:
    """P problems x G rollouts of one team; those of a problem stand together. Never changed."""

    problems: list[Problem]  # (R,) the problem of each rollout
    messages: list[list[Message]]  # (R,) lists of messages in turn order
    returns: Tensor  # (R,) fp32
    group_size: int
    seconds: float = 0.0  # that collecting took; 0 where rollouts are used again
    log_weights: Tensor | None = None  # (R,) log density ratio of the team as it now is [ours]; None: 0
    reused: bool = False  # an earlier update trained on them

    @property
    def grouped_returns(self) -> Tensor:
        return self.returns.view(-1, self.group_size)  # (P, G)

    @property
    def grouped_weights(self) -> Tensor | None:
        return None if self.weights is None else self.weights.view(-1, self.group_size)  # (P, G)

    @functools.cached_property
    def weights(self) -> Tensor | None:
        """w_r = R rho_r / sum rho (R,), mean 1 [ours]; None where all are 1."""
        if self.log_weights is None:
            return None
        return self.log_weights.double().softmax(0).float() * len(self.returns)

    @property
    def ess(self) -> float:
        """Effective sample share (sum w)^2 / (R sum w^2), from 1/R to 1."""
        return 1.0 if self.weights is None else 1 / self.weights.double().square().mean().item()

    @property
    def tokens_sampled(self) -> int:
        return 0 if self.reused else sum(len(m.tokens) for messages in self.messages for m in messages)

    def by(self, agents: list[int]) -> list[Message]:
        return [m for messages in self.messages for m in messages if m.agent in agents]


@dataclass
class AgentBatch:
    """Rollouts as one agent trains on them; sums over the batches of an update make the whole.

    A row holds a prefix tree of rollouts (packing.py), padded on the right. What rollouts share, such as the
    problem, stands in it once. So does a token that several rollouts sampled in the same context: it is one
    of the batch's `pairs` of context and token. The trainable tokens are one flat list of N, ascending in
    `message`: the agent's sampled tokens, without contexts, padding, and end tokens of cut-off messages."""

    model: Transformer  # the agent's
    agent: int
    rows: Packed  # (B, T)
    where: Tensor  # (pairs,) int64: position in the flattened (B * T) whose hidden state predicts the token
    targets: Tensor  # (pairs,) int64: the token
    pair: Tensor  # (N,) int64: pair of each sampled token
    message: Tensor  # (N,) int64 in 0..M-1: message of each token
    sampled_logp: Tensor  # (N,) fp32, the sampler's
    advantage: Tensor  # (M,) fp32
    weight: Tensor  # (M,) fp32, of its rollout
    rollout: Tensor  # (M,) int64 in 0..R-1: the rollout that holds the message
    turn: Tensor  # (M,) int64: the message's number there, among those of models
    pulls: bool  # whether any advantage with weight is not 0
    total_weight: float  # sum of the messages' weights
    old_logp: Tensor | None = field(default=None, init=False)  # (N,) log pi_old, from an update's first pass

    def hidden(self, model: Transformer) -> Tensor:
        """(pairs, H): hidden states of `model` that predict the pairs' tokens."""
        step = Step.trees(self.rows.positions, self.rows.end, model.dtype)
        return model.hidden(self.rows.tokens, step, self.where)

    def per_message(self, x: Tensor) -> Tensor:
        """Sum tokens (N,) into their messages (M,)."""
        return x.new_zeros(len(self.advantage)).index_add(0, self.message, x)


@dataclass(frozen=True)
class Batches:
    """The batches of one update; `own` are those of this process. Processes with sharded weights make as many
    passes through each model as one another: where one has fewer batches, some of NOTHING fill up."""

    own: list[AgentBatch]
    rollouts: int  # R
    weight: list[float]  # (A,) total weight of each agent's messages, in all processes
    messages: int  # in all processes
    tokens: int  # N, in all processes
    pulls: bool  # whether any advantage is not 0, in any process


def agent_batches(
    team: Team, rollouts: Rollouts, agents: list[int], advantages: Tensor, batch_tokens: int
) -> Batches:
    """The batches on which `agents` train, given one advantage per rollout (R,). A batch has at most
    `batch_tokens` padded tokens, or one rollout. Problems without any advantage have batches of their own:
    most need no gradient. Rollouts without a turn of the agent are left out; processes share the rest."""
    ranks, size = team.ranks, rollouts.group_size
    share = ranks.share(len(rollouts.messages) // size)
    pulls = advantages.view(-1, size).any(1).tolist()  # (P,)
    own, weights = [], []
    for j in agents:
        model, batches, rows = team.agents[j].model, [], range(share.start * size, share.stop * size)
        seen = {r: team.render(j, rollouts.problems[r], rollouts.messages[r], False) for r in rows}
        cost = model.config.pairs_per_token
        for pulling in (True, False):
            # Nothing is predicted from a rollout's last token.
            sequences = [(r, s.ids[:-1]) for r, s in seen.items() if s.spans and pulls[r // size] == pulling]
            trees = trees_of(sequences, batch_tokens, cost)
            for some in batches_of(trees, batch_tokens, cost, model.device):
                batches.append(_batch(model, j, rollouts, some, seen, advantages))
        weights.append(ranks.total(sum(batch.total_weight for batch in batches)))
        for _ in range(max(ranks.gather(len(batches))) - len(batches) if model.sharded else 0):
            batches.append(_batch(model, j, rollouts, [NOTHING], seen, advantages))
        own += batches
    pulled = any(ranks.gather(any(batch.pulls for batch in own)))
    tokens = [len(message.tokens) for message in rollouts.by(agents)]
    return Batches(own, len(rollouts.messages), weights, len(tokens), sum(tokens), pulled)


def _batch(
    model: Transformer, j: int, rollouts: Rollouts, trees: list[Tree], seen: dict, advantages: Tensor
) -> AgentBatch:
    """One batch of agent j, of these trees; `seen`: rollout -> Rendered, advantages (R,)."""
    rows = pack(trees, model.device)
    pair, message, sampled_logp, rollout, turns = [], [], [], [], []
    pairs: dict[tuple[int, int], int] = {}  # (position in the flattened rows, token) -> number
    for r, path in rows.paths.items():
        spoken = [m for m in rollouts.messages[r] if m.tokens]  # without tools, which may be silent at a turn
        own = [(turn, m) for turn, m in enumerate(spoken) if m.agent == j]
        for (start, stop), (turn, m) in zip(seen[r].spans, own):
            for t, token in zip(path[start - 1 : stop - 1], m.tokens):
                pair.append(pairs.setdefault((t, token), len(pairs)))
            message += [len(rollout)] * len(m.tokens)
            sampled_logp += m.logprobs
            rollout.append(r)
            turns.append(turn)
    where, targets = zip(*(pairs or [(0, 0)]))
    advantage = advantages[rollout]
    weight = torch.ones(len(rollout)) if rollouts.weights is None else rollouts.weights[rollout]
    ints = functools.partial(torch.tensor, dtype=torch.long, device=model.device)
    floats = functools.partial(torch.as_tensor, device=model.device)
    return AgentBatch(
        model, j, rows, ints(where), ints(targets), ints(pair), ints(message), floats(sampled_logp),
        advantage=floats(advantage), weight=floats(weight), rollout=ints(rollout), turn=ints(turns),
        pulls=bool((advantage * weight).any()), total_weight=weight.double().sum().item(),
    )  # fmt: skip


def collect(
    team: Team, problems: list[Problem], group: int, path: rng.RngPath, label: str = "sampling"
) -> Rollouts:
    """Let the team as it now is work `group` times on every problem, and grade the results. A draw is a
    function of the rng path, the rollout, the turn and the position alone, so batching changes no law and, to
    rounding, no token. Processes share the problems; then all have all rollouts. `label` is the bar's."""
    begin = time.perf_counter()
    repeated = [problem for problem in problems for _ in range(group)]  # (R,)
    share = team.ranks.share(len(problems))
    start, stop = share.start * group, share.stop * group
    most = max(team.ranks.gather(stop - start))

    def sample(batch_rows: int) -> list[list[Message]]:
        if batch_rows < team.batch_rows:  # that many have filled the memory
            for agent in (agent for agent in team.agents if agent.sampler):
                agent.sampler.release()
        messages, total = [], (stop - start) * team.turns
        with tqdm(total=total, desc=label, unit="message", delay=1, leave=False, disable=None) as bar:
            for first in range(start, start + most, batch_rows):  # a process with fewer rows keeps company
                rows = slice(min(first, stop), min(first + batch_rows, stop))
                messages += team.take_turns(repeated[rows], path, rows.start, bar.update)
        return messages

    messages, team.batch_rows = halving(sample, team.batch_rows, team.ranks)
    returns = [team.task.grade(problem, row) for problem, row in zip(repeated[start:stop], messages)]
    if team.ranks.size > 1:  # then all have all, in order
        parts = team.ranks.gather([[[vars(m) for m in row] for row in messages], returns])
        messages = [[Message(**fields) for fields in row] for rows, _ in parts for row in rows]
        returns = [value for _, part in parts for value in part]
    return Rollouts(repeated, messages, torch.tensor(returns), group, time.perf_counter() - begin)
