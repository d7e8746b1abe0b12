"""A team's turns -> Rollouts -> the batch that one agent trains on."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.sampler import Sampler
from teamtr_min.tasks import Problem
from teamtr_min.team import Message, Team, View


@dataclass
class AgentBatch:
    """Rollouts of similar length as one agent trains on them; sums over a list of these make the whole batch.

    One row per rollout, padded on the right. The agent's sampled tokens, and nothing else, are one flat list
    of N, ascending in `message`: no contexts, no padding, not the end token that closes a cut-off message.
    """

    tokens: Tensor  # (R, T) int64
    where: Tensor  # (N,) int64: position in the flattened (R * T) whose hidden state predicts the token
    targets: Tensor  # (N,) int64: the token
    message: Tensor  # (N,) int64 in 0..M-1
    sampled_logp: Tensor  # (N,) fp32, the sampler's
    advantage: Tensor  # (M,) fp32
    # pi_old, filled in by the update's first forward pass:
    old_logp: Tensor | None = None  # (N,) fp32
    old_hidden: Tensor | None = None  # (N, C), for the exact KL only


@dataclass
class Rollouts:
    """P problems x G rollouts of one team; those of a problem stand together."""

    team: Team
    problems: list[Problem]  # (R,) the problem of each rollout
    messages: list[list[Message]]  # (R,) lists of messages in turn order
    returns: Tensor  # (R,) fp32
    group_size: int
    seconds: float

    @property
    def grouped_returns(self) -> Tensor:
        return self.returns.view(-1, self.group_size)  # (P, G)

    @property
    def tokens_sampled(self) -> int:
        return sum(len(m.tokens) for messages in self.messages for m in messages)

    @property
    def accuracy(self) -> float:
        """Share of rollouts with the full return of 1."""
        return (self.returns == 1).float().mean().item()

    @property
    def constant_groups(self) -> float:
        """Share of problems whose rollouts all have the same return: they pull nowhere."""
        returns = self.grouped_returns
        return (returns.amax(1) == returns.amin(1)).float().mean().item()

    def by(self, agent: int) -> list[Message]:
        return [m for messages in self.messages for m in messages if m.agent == agent]

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

    def _batch(self, agent: int, rows: list[int], views: list[View], advantage: Tensor) -> AgentBatch:
        width = max(len(views[r].ids) for r in rows)
        tokens, where, targets, message, sampled, weights = [], [], [], [], [], []
        for row, r in enumerate(rows):
            ids = views[r].ids
            tokens.append(ids + [0] * (width - len(ids)))
            own = [m for m in self.messages[r] if m.agent == agent]
            for (start, stop), m in zip(views[r].spans, own):
                where += range(row * width + start - 1, row * width + stop - 1)
                targets += m.tokens
                message += [len(weights)] * len(m.tokens)
                sampled += m.logprobs
                weights.append(r)
        device = self.team.agents[agent].model.device
        return AgentBatch(
            tokens=torch.tensor(tokens, device=device),
            where=torch.tensor(where, device=device),
            targets=torch.tensor(targets, device=device),
            message=torch.tensor(message, device=device),
            sampled_logp=torch.tensor(sampled, device=device),
            advantage=advantage[weights].to(device),
        )


def collect(
    team: Team,
    problems: list[Problem],
    group: int,
    grade: Callable[[Problem, list[Message]], float],
    config: Config,
    place: tuple,
) -> Rollouts:
    """Let the team as it now is work `group` times on every problem, and grade what came out.

    `place` names this collection within the run, as ("train", stage, update). Each draw is a function of
    (config.seed, place, rollout, turn, position) alone, so batching changes nothing.
    """
    start = time.perf_counter()
    repeated = [problem for problem in problems for _ in range(group)]  # (R,)
    messages: list[list[Message]] = []
    for first in range(0, len(repeated), config.batch_rows):
        messages += _play(team, repeated[first : first + config.batch_rows], first, config, place)
    returns = torch.tensor([float(grade(p, m)) for p, m in zip(repeated, messages)])
    return Rollouts(team, repeated, messages, returns, group, time.perf_counter() - start)


def _play(
    team: Team, problems: list[Problem], first: int, config: Config, place: tuple
) -> list[list[Message]]:
    """All turns of one batch of rollouts, the first of which is number `first` of the whole collection."""
    transcripts: list[list[Message]] = [[] for _ in problems]
    samplers: dict[int, Sampler] = {}
    for turn in range(team.turns):
        speakers = []
        for r, transcript in enumerate(transcripts):
            uniform = rng.key(config.seed, "route", *place, first + r, turn) / 2**64
            speakers.append(team.route(turn, transcript, uniform))
        for j in sorted(set(speakers)):
            agent, rows = team.agents[j], [r for r, speaker in enumerate(speakers) if speaker == j]
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
