"""A team's turns -> Rollouts -> the batches that one agent trains on."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import Ranks
from teamtr_min.engine.model import Transformer
from teamtr_min.engine.packing import PackedStep, Tree, batches_of, pack, trees_of
from teamtr_min.engine.sampler import Sampler
from teamtr_min.run.progress import SamplingBar
from teamtr_min.tasks import Problem
from teamtr_min.team import Message, Rendered, Team


@dataclass(frozen=True)
class AgentBatch:
    """Rollouts as one agent trains on them; sums over a list of these make the whole batch.

    A row holds a prefix tree of rollouts (packing.py), padded on the right: what they have in common, such
    as the problem, stands once. So does a token that several rollouts sampled in the same context: it is one
    of the batch's `pairs` of context and token. The agent's sampled tokens, and nothing else, are one flat
    list of N, ascending in `message`: no contexts, no padding, not the end token that closes a cut-off
    message.
    """

    model: Transformer  # the agent's
    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, in the rollout
    end: Tensor | None  # (B, T) int64: where what follows upon a token ends; None if each row is a rollout
    where: Tensor  # (pairs,) int64: position in the flattened (B * T) whose hidden state predicts the token
    targets: Tensor  # (pairs,) int64: the token
    pair: Tensor  # (N,) int64: the pair that each sampled token is
    message: Tensor  # (N,) int64 in 0..M-1: whose token it is
    sampled_logp: Tensor  # (N,) fp32, the sampler's
    advantage: Tensor  # (M,) fp32
    rollout: Tensor  # (M,) int64: number of the rollout that holds the message
    turn: Tensor  # (M,) int64: and its turn there

    def hidden(self, model: Transformer) -> Tensor:
        """(pairs, H): the hidden states that predict the pairs' tokens under `model`."""
        return model.hidden(self.tokens, packed=PackedStep(self.positions, self.end, self.where, model.dtype))

    @torch.no_grad()
    def logps(self, model: Transformer, temperature: float) -> Tensor:
        """(N,) fp32 log-probs of the tokens under `model`."""
        return kernels.linear_logprob(self.hidden(model), model.head, self.targets, temperature)[self.pair]

    def per_message(self, x: Tensor) -> Tensor:
        """Sum tokens (N,) into their messages (M,)."""
        return x.new_zeros(len(self.advantage)).index_add(0, self.message, x)


class Prefix(NamedTuple):
    """The start of a rollout that is there already."""

    messages: list[Message]
    next_agent: int | None = None  # whose turn comes next, where the router has said so


@dataclass(frozen=True)
class Rollouts:
    """P problems x G rollouts of one team; those of a problem stand together."""

    team: Team
    problems: list[Problem]  # (R,) the problem of each rollout
    messages: list[list[Message]]  # (R,) lists of messages in turn order
    returns: Tensor  # (R,) fp32
    group_size: int
    reused: list[int]  # (R,) how many of its first messages an earlier collection had sampled
    seconds: float  # that collecting took

    @property
    def grouped_returns(self) -> Tensor:
        return self.returns.view(-1, self.group_size)  # (P, G)

    @property
    def accuracy(self) -> float:
        """Share of rollouts with the full return of 1."""
        return (self.returns == 1).float().mean().item()

    @property
    def zero_variance_groups(self) -> float:
        """Share of problems whose rollouts all have the same return, and so no advantage."""
        returns = self.grouped_returns
        return (returns.amax(1) == returns.amin(1)).float().mean().item()

    @property
    def tokens_sampled(self) -> int:
        return sum(len(m.tokens) for messages, k in zip(self.messages, self.reused) for m in messages[k:])

    @property
    def count_sampled(self) -> int:
        """Rollouts that this collection sampled, at least in part."""
        return sum(len(messages) > k for messages, k in zip(self.messages, self.reused))

    def by(self, agents: list[int]) -> list[Message]:
        return [m for messages in self.messages for m in messages if m.agent in agents]

    def prefixes_before(self, agents: set[int]) -> list[Prefix]:
        """Of each rollout what precedes the first message of any of `agents`: they had no part in it.

        Nor in the router's choice of them, which stays: asked again at just these moments, a random router
        would name them too rarely.
        """
        prefixes = []
        for messages in self.messages:
            turn = next((t for t, message in enumerate(messages) if message.agent in agents), None)
            prefixes.append(
                Prefix(messages) if turn is None else Prefix(messages[:turn], messages[turn].agent)
            )
        return prefixes

    def batches(self, agents: list[int], advantages: Tensor, batch_tokens: int) -> list[AgentBatch]:
        """What each of `agents` trains on, given one advantage per rollout (R,).

        A batch has at most `batch_tokens` tokens, padding included, or one rollout. Problems without any
        advantage have batches of their own: most of these need no gradient. Rollouts in which the agent took
        no turn are left out. Of several ranks each gets the batches of its own share of the problems.
        """
        batches, size = [], self.group_size
        problems = self.team.ranks.share(len(self.messages) // size)
        own = range(problems.start * size, problems.stop * size)
        pulls = advantages.view(-1, size).any(1).tolist()  # (P,)
        for j in agents:
            seen = {
                r: self.team.render(j, self.problems[r].text, self.messages[r], add_generation_prompt=False)
                for r in own
            }
            model = self.team.agents[j].model
            pairs_per_token = model.config.pairs_per_token
            for pulling in (True, False):
                # Nothing is predicted from a rollout's last token.
                sequences = [
                    (r, s.ids[:-1]) for r, s in seen.items() if s.spans and pulls[r // size] == pulling
                ]
                trees = trees_of(sequences, batch_tokens, pairs_per_token)
                for rows in batches_of(trees, batch_tokens, pairs_per_token, model.device):
                    batches.append(self._batch(j, rows, seen, advantages))
        return batches

    def message_logps(self, agent: int, model: Transformer, batch_tokens: int) -> Tensor:
        """(R, turns) log-probs of the messages of `agent` under `model`, 0 at others' turns."""
        table = torch.zeros(len(self.messages), self.team.turns)
        with model.in_step():
            for batch in self.batches([agent], torch.zeros_like(self.returns), batch_tokens):
                logps = batch.per_message(batch.logps(model, self.team.temperature))  # (M,)
                table[batch.rollout, batch.turn] = logps.cpu()
        self.team.ranks.sum([table])
        return table

    def _batch(
        self, agent: int, rows: list[Tree], seen: dict[int, Rendered], advantages: Tensor
    ) -> AgentBatch:
        model = self.team.agents[agent].model
        packed = pack(rows, model.device)
        pair, message, sampled_logp, rollout, turns = [], [], [], [], []
        pairs: dict[tuple[int, int], int] = {}  # (position in the flattened rows, token) -> number
        for r, path in packed.paths.items():
            own = [(turn, m) for turn, m in enumerate(self.messages[r]) if m.agent == agent]
            for (start, stop), (turn, m) in zip(seen[r].spans, own):
                for t, token in zip(path[start - 1 : stop - 1], m.tokens):
                    pair.append(pairs.setdefault((t, token), len(pairs)))
                message += [len(rollout)] * len(m.tokens)
                sampled_logp += m.logprobs
                rollout.append(r)
                turns.append(turn)
        where, targets = zip(*pairs)
        rollout = torch.tensor(rollout)
        return AgentBatch(
            model=model,
            tokens=packed.tokens,
            positions=packed.positions,
            end=packed.end,
            where=torch.tensor(where, device=model.device),
            targets=torch.tensor(targets, device=model.device),
            pair=torch.tensor(pair, device=model.device),
            message=torch.tensor(message, device=model.device),
            sampled_logp=torch.tensor(sampled_logp, device=model.device),
            advantage=advantages[rollout].to(model.device),
            rollout=rollout,
            turn=torch.tensor(turns),
        )


def collect(
    team: Team,
    task,
    problems: list[Problem],
    group: int,
    path: rng.RngPath,
    prefixes: list[Prefix] | None = None,
    label: str = "sampling",
    compact: bool = False,
) -> Rollouts:
    """Let the team as it now is work `group` times on every problem, and grade what came out.

    Each draw is a function of the rng path, rollout, turn and position alone, so batching changes nothing.
    `prefixes`: how each rollout begins, where that is kept (`--resample suffix`). `label` stands before the
    bar on the terminal. `compact`: hold what was written in a tenth of the memory, to be looked at only.
    Of several ranks each works on its share of the problems; then all have everything.
    """
    begin = time.perf_counter()
    repeated = [problem for problem in problems for _ in range(group)]  # (R,)
    prefixes = prefixes or [Prefix([])] * len(repeated)
    messages: list[list[Message]] = []
    returns: list[float] = []
    reused = [len(prefix.messages) for prefix in prefixes]
    share = team.ranks.share(len(problems))
    start, stop = share.start * group, share.stop * group
    expected = (stop - start) * team.turns - sum(reused[start:stop])
    with SamplingBar(label, stop - start, expected) as bar:
        most = team.ranks.largest_share(len(problems)) * group
        # An agent with turns to come keeps its cache for these rollouts, and only then takes others.
        at_once = team.batch_rows if team.caches_stay else max(most, 1)
        for offset in range(0, most, at_once):
            first = min(start + offset, stop)  # where other ranks have one batch more, there are no rows
            rows = slice(first, min(first + at_once, stop))
            written = _take_turns(team, repeated[rows], prefixes[rows], first, path, bar, compact)
            for problem, row in zip(repeated[rows], written):  # arrays of compact messages as lists again
                returns.append(float(task.grade(problem, [m.copy() for m in row] if compact else row)))
            messages += written
    if team.ranks.size > 1:
        messages, returns = _gathered(team.ranks, messages, returns, compact)
    returns = torch.tensor(returns)
    if not returns.isfinite().all():
        raise FloatingPointError("the task graded a rollout with NaN or infinity")
    return Rollouts(team, repeated, messages, returns, group, reused, time.perf_counter() - begin)


def _gathered(
    ranks: Ranks, messages: list[list[Message]], returns: list[float], compact: bool
) -> tuple[list[list[Message]], list[float]]:
    """The messages and returns of all ranks' rollouts, in order, from those of this rank's."""
    fields = [[[m.agent, [*m.tokens], m.text, [*m.logprobs], m.stopped] for m in row] for row in messages]
    parts = ranks.gather([fields, returns])
    rows = [[Message(*values) for values in row] for fields, _ in parts for row in fields]
    if compact:
        rows = [[m.compact() for m in row] for row in rows]
    return rows, [value for _, part in parts for value in part]


def _take_turns(
    team: Team,
    problems: list[Problem],
    prefixes: list[Prefix],
    first: int,
    path: rng.RngPath,
    bar: SamplingBar,
    compact: bool,
) -> list[list[Message]]:
    """All turns of some rollouts, the first of which is number `first` of the whole collection."""
    transcripts = [list(prefix.messages) for prefix in prefixes]
    samplers: dict[int, Sampler] = {}
    for turn in range(team.turns):
        turn_of = {}  # row -> agent
        for r, (transcript, prefix) in enumerate(zip(transcripts, prefixes)):
            if turn == len(prefix.messages) and prefix.next_agent is not None:
                turn_of[r] = prefix.next_agent
            elif turn == len(transcript):
                turn_of[r] = team.route(turn, transcript, path.key("route", first + r, turn) / 2**64)
        for j, agent in enumerate(team.agents):
            rows = [r for r, chosen in turn_of.items() if chosen == j]
            prompts = [
                team.render(j, problems[r].text, transcripts[r], add_generation_prompt=True).ids for r in rows
            ]
            keys = [path.key("rollout", first + r, turn) for r in rows]
            stop = [agent.chat.end_of_message]
            with agent.model.in_step():
                if not rows:
                    continue
                if j not in samplers:
                    samplers[j] = Sampler(agent.model, len(problems), team.batch_rows)
                bar.begin(len(rows), last_turn=turn + 1 == team.turns)
                completions = samplers[j].generate(
                    rows, prompts, keys, team.max_new_tokens, team.temperature, stop, bar.step
                )
            bar.end(sum(len(c.tokens) for c in completions))
            texts = agent.tokenizer.decode_batch([c.tokens[: len(c.tokens) - c.stopped] for c in completions])
            for r, c, text in zip(rows, completions, texts):
                message = Message(j, c.tokens, text, c.logprobs, c.stopped)
                transcripts[r].append(message.compact() if compact else message)
            if team.writes_last(j, turn):
                del samplers[j]  # the memory of its cache serves the next agent
    return transcripts
