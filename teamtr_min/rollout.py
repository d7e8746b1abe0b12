"""A team's turns -> Rollouts -> the batch that one agent trains on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.model import Transformer
from teamtr_min.sampler import Sampler
from teamtr_min.tasks import Problem
from teamtr_min.team import Message, Team, View


@dataclass
class AgentBatch:
    """Rollouts of similar length as one agent trains on them; sums over a list of these make the whole batch.

    One row per rollout, padded on the right. The agent's sampled tokens, and nothing else, are one flat list
    of N, ascending in `message`: no contexts, no padding, not the end token that closes a cut-off message.
    """

    model: Transformer  # the agent's
    tokens: Tensor  # (R, T) int64
    where: Tensor  # (N,) int64: position in the flattened (R * T) whose hidden state predicts the token
    targets: Tensor  # (N,) int64: the token
    message: Tensor  # (N,) int64 in 0..M-1
    sampled_logp: Tensor  # (N,) fp32, the sampler's
    advantage: Tensor  # (M,) fp32
    place: tuple[Tensor, Tensor]  # (M,) int64 each: number of the rollout, and turn in it
    # pi_old, filled in by the update's first forward pass:
    old_logp: Tensor | None = None  # (N,) fp32
    old_hidden: Tensor | None = None  # (N, C), for the exact KL only

    @torch.no_grad()
    def logp(self, model: Transformer, temperature: float) -> Tensor:
        """(N,) fp32 log-probs of the tokens under `model`."""
        hidden = model.hidden(self.tokens).flatten(0, 1)[self.where]  # (N, C)
        return kernels.linear_logprob(hidden, model.head, self.targets, temperature)

    def per_message(self, x: Tensor) -> Tensor:
        """Sum tokens (N,) into their messages (M,)."""
        return x.new_zeros(len(self.advantage)).index_add(0, self.message, x)


class Head(NamedTuple):
    """The start of a rollout that is there already."""

    messages: list[Message]
    speaker: int | None = None  # whose turn comes next, where the router has said so


@dataclass
class Rollouts:
    """P problems x G rollouts of one team; those of a problem stand together."""

    team: Team
    problems: list[Problem]  # (R,) the problem of each rollout
    messages: list[list[Message]]  # (R,) lists of messages in turn order
    returns: Tensor  # (R,) fp32
    group_size: int
    seconds: float
    kept: list[int]  # (R,) how many of its first messages an earlier collection had sampled
    log_weight: Tensor  # (R,) fp32: log-likelihood of the rollout under the present team over its writers'

    @property
    def grouped_returns(self) -> Tensor:
        return self.returns.view(-1, self.group_size)  # (P, G)

    @property
    def tokens_sampled(self) -> int:
        return sum(len(m.tokens) for messages, k in zip(self.messages, self.kept) for m in messages[k:])

    @property
    def sampled(self) -> int:
        """Rollouts that this collection sampled, at least in part."""
        return sum(len(messages) > k for messages, k in zip(self.messages, self.kept))

    @property
    def weights(self) -> Tensor:
        """Importance weights (R,) of the present team on these rollouts, self-normalised: their mean is 1."""
        return self.log_weight.softmax(0) * len(self.log_weight)

    @property
    def accuracy(self) -> float:
        """Share of rollouts with the full return of 1."""
        return (self.returns == 1).float().mean().item()

    @property
    def constant_groups(self) -> float:
        """Share of problems whose rollouts all have the same return: they pull nowhere."""
        returns = self.grouped_returns
        return (returns.amax(1) == returns.amin(1)).float().mean().item()

    def by(self, agents: list[int]) -> list[Message]:
        return [m for messages in self.messages for m in messages if m.agent in agents]

    def before(self, agents: set[int]) -> list[Head]:
        """Of each rollout what precedes the first message of any of `agents`: they had no part in it.

        Nor in the router's choice of them, which stays: asked again at just these moments, a random router
        would name them too rarely.
        """
        heads = []
        for messages in self.messages:
            for turn, message in enumerate(messages):
                if message.agent in agents:
                    heads.append(Head(messages[:turn], message.agent))
                    break
            else:
                heads.append(Head(messages))
        return heads

    def view(self, agent: int, advantage: Tensor, batch_tokens: int = 16384) -> list[AgentBatch]:
        """What `agent` trains on, given one advantage per rollout (R,).

        Rollouts are sorted by length and cut into batches of at most `batch_tokens` padded tokens (one row at
        least), so that no row is padded to the longest of all. Rollouts in which the agent was silent are
        left out.
        """
        views = [self.team.view(agent, p.text, m, speak=False) for p, m in zip(self.problems, self.messages)]
        spoken = sorted((r for r, v in enumerate(views) if v.spans), key=lambda r: len(views[r].ids))
        batches, start = [], 0
        while start < len(spoken):
            stop = start + 1
            while stop < len(spoken) and (stop + 1 - start) * len(views[spoken[stop]].ids) <= batch_tokens:
                stop += 1
            batches.append(self._batch(agent, spoken[start:stop], views, advantage))
            start = stop
        return batches

    def message_logp(self, agent: int, model: Transformer, config: Config) -> Tensor:
        """(R, T) log-prob under `model`, at the sampling temperature, of each message of `agent`; else 0."""
        table = torch.zeros(len(self.messages), self.team.turns)
        for batch in self.view(agent, torch.zeros_like(self.returns), config.batch_tokens):
            table[batch.place] = batch.per_message(batch.logp(model, config.temperature)).cpu()
        return table

    def reweigh(self, batches: list[AgentBatch], temperature: float) -> None:
        """Account for an update on `batches` of these rollouts: its agent is another one than wrote them."""
        for batch in batches:
            change = batch.per_message(batch.logp(batch.model, temperature) - batch.old_logp)  # (M,)
            self.log_weight.index_add_(0, batch.place[0], change.cpu())

    def _batch(self, agent: int, rows: list[int], views: list[View], advantage: Tensor) -> AgentBatch:
        width = max(len(views[r].ids) for r in rows)
        tokens, where, targets, message, sampled, place = [], [], [], [], [], []
        for row, r in enumerate(rows):
            ids = views[r].ids
            tokens.append(ids + [0] * (width - len(ids)))
            own = [(turn, m) for turn, m in enumerate(self.messages[r]) if m.agent == agent]
            for (start, stop), (turn, m) in zip(views[r].spans, own):
                where += range(row * width + start - 1, row * width + stop - 1)
                targets += m.tokens
                message += [len(place)] * len(m.tokens)
                sampled += m.logprobs
                place.append((r, turn))
        model = self.team.agents[agent].model
        device, (rollout, turn) = model.device, torch.tensor(place).unbind(1)
        return AgentBatch(
            model=model,
            tokens=torch.tensor(tokens, device=device),
            where=torch.tensor(where, device=device),
            targets=torch.tensor(targets, device=device),
            message=torch.tensor(message, device=device),
            sampled_logp=torch.tensor(sampled, device=device),
            advantage=advantage[rollout].to(device),
            place=(rollout, turn),
        )


def collect(
    team: Team,
    problems: list[Problem],
    group: int,
    grade: Callable[[Problem, list[Message]], float],
    config: Config,
    place: tuple,
    heads: list[Head] | None = None,
) -> Rollouts:
    """Let the team as it now is work `group` times on every problem, and grade what came out.

    `place` names this collection within the run, as ("train", stage, update). Each draw is a function of
    (config.seed, place, rollout, turn, position) alone, so batching changes nothing. `heads`: how each
    rollout begins, where that is kept (`--resample suffix`).
    """
    start = time.perf_counter()
    repeated = [problem for problem in problems for _ in range(group)]  # (R,)
    heads = heads or [Head([])] * len(repeated)
    messages: list[list[Message]] = []
    for first in range(0, len(repeated), config.batch_rows):
        rows = slice(first, first + config.batch_rows)
        messages += _play(team, repeated[rows], heads[rows], first, config, place)
    returns = torch.tensor([float(grade(p, m)) for p, m in zip(repeated, messages)])
    kept, log_weight = [len(head.messages) for head in heads], torch.zeros(len(repeated))
    return Rollouts(team, repeated, messages, returns, group, time.perf_counter() - start, kept, log_weight)


def _play(
    team: Team,
    problems: list[Problem],
    heads: list[Head],
    first: int,
    config: Config,
    place: tuple,
) -> list[list[Message]]:
    """All turns of one batch of rollouts, the first of which is number `first` of the whole collection."""
    transcripts = [list(head.messages) for head in heads]
    samplers: dict[int, Sampler] = {}
    for turn in range(team.turns):
        speakers = {}  # row -> agent
        for r, (transcript, head) in enumerate(zip(transcripts, heads)):
            if turn == len(head.messages) and head.speaker is not None:
                speakers[r] = head.speaker
            elif turn == len(transcript):
                uniform = rng.key(config.seed, "route", *place, first + r, turn) / 2**64
                speakers[r] = team.route(turn, transcript, uniform)
        for j in sorted(set(speakers.values())):
            agent, rows = team.agents[j], [r for r, speaker in speakers.items() if speaker == j]
            if j not in samplers:
                samplers[j] = Sampler(agent.model, len(problems))
            completions = samplers[j].speak(
                rows,
                [team.view(j, problems[r].text, transcripts[r], speak=True).ids for r in rows],
                [rng.key(config.seed, "rollout", *place, first + r, turn) for r in rows],
                config.max_new_tokens,
                config.temperature,
                [agent.chat.end_of_message],
            )
            texts = agent.tokenizer.decode_batch([c.tokens[: len(c.tokens) - c.stopped] for c in completions])
            for r, c, text in zip(rows, completions, texts):
                transcripts[r].append(Message(j, c.tokens, text, c.logprobs, c.stopped))
            if team.speaks_last(j, turn):
                del samplers[j]  # the memory of its cache serves the next agent
    return transcripts
