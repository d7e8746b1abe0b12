"""`--diagnostics`: estimates of stale gap, occupancy shift and lower bounds, on rollouts of their own.

The estimators read tables with a row per rollout and a column per turn, (R, turns); the G rollouts of a
problem are neighbours. j is the agent that is updated; team^0 is the team at the start of the stage,
team^{i-1} the one just before the update:

    writes    bool: j wrote this message
    log_w     log pi_new - log pi_old of the message, 0 where another agent wrote it
    log_rho   log-likelihood of all messages *before* this turn under team^{i-1}, minus under team^0

studies/estimators.py checks them on enumerable teams.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import unsharded
from teamtr_min.engine.model import Transformer
from teamtr_min.rollout import Rollouts, agent_batches, collect
from teamtr_min.team import Team

GAMMA = 0.99  # [ours] the paper's is not public
RESAMPLES = 500


def centred(returns: Tensor) -> Tensor:
    """Returns (P, G) minus the mean of the problem's *other* rollouts: independent, so unbiased. [ours]"""
    return (returns - returns.mean(1, keepdim=True)) * (returns.shape[1] / (returns.shape[1] - 1))


def surrogate_terms(returns: Tensor, log_w: Tensor, writes: Tensor) -> Tensor:
    """(R,) terms whose mean estimates L^seq, undiscounted: sum over j's turns of (w - 1)(return - baseline).
    In each state E_old[A] = 0, so w - 1 in place of w changes the variance alone."""
    return (log_w.expm1() * writes).sum(1) * centred(returns).flatten()


def gap_terms(returns: Tensor, log_w: Tensor, log_rho: Tensor, writes: Tensor) -> Tensor:
    """(R,) terms whose mean estimates the signed gap L^seq - L^stale from rollouts of team^{i-1}. The weight
    1/rho turns team^{i-1}'s states into team^0's; the advantages stay team^{i-1}'s."""
    return (-(-log_rho).expm1() * log_w.expm1() * writes).sum(1) * centred(returns).flatten()


def occupancy_shift(log_rho: Tensor, writes: Tensor) -> Tensor:
    """D_occ in [0, 1]: total variation between team^{i-1}'s and team^0's states where j acts, turn by turn.
    From rollouts of *team^0*: E|rho - 1| / 2 over j's messages, rho self-normalised within each turn."""
    rho = log_rho.exp() * writes
    mean = rho.sum(0) / writes.sum(0).clamp(min=1)  # (turns,)
    return ((rho / mean.clamp(min=1e-30) - 1).abs() * writes).sum() / (2 * writes.sum().clamp(min=1))


def effective_sample_share(log_rho: Tensor, writes: Tensor) -> Tensor:
    """ESS/B, a share of j's messages in rollouts of team^0: (sum rho)^2 / (messages * sum rho^2)."""
    drift = log_rho * writes
    rho = (drift - drift.max()).exp() * writes  # no overflow; the scale cancels
    return rho.sum().square() / (writes.sum() * rho.square().sum()).clamp(min=1e-300)


def message_kl(log_w: Tensor, writes: Tensor) -> Tensor:
    """KL(old || new) per message of j, as the mean of w - 1 - log w: unbiased on rollouts held out. [ours]"""
    return ((log_w.expm1() - log_w) * writes).sum() / writes.sum().clamp(min=1)


def before_turn(log_ratio: Tensor) -> Tensor:
    """(R, turns) log-ratio of each message -> of all messages before it."""
    return F.pad(log_ratio.cumsum(1)[:, :-1], (1, 0))


def penalty_constant(gamma: float = GAMMA, largest_advantage: float = 1.0) -> float:
    """c of Prop. 3.3 and Thm 3.4 to 3.7: sqrt(2) gamma A_max / (1 - gamma)^2."""
    return math.sqrt(2) * gamma * largest_advantage / (1 - gamma) ** 2


def bootstrap(statistic: Callable, *tables: Tensor, group: int, seed: int) -> tuple[float, list[float]]:
    """A statistic of tables (R, ...) and its 95% percentile interval over problems, `group` rows each."""
    problems = len(tables[0]) // group
    chosen = rng.generator(seed, "bootstrap").integers(problems, size=(RESAMPLES, problems))
    rows = (torch.from_numpy(chosen)[..., None] * group + torch.arange(group)).flatten(1)  # (resamples, R)
    values = torch.vmap(statistic)(*(table[rows] for table in tables)).double()
    return statistic(*tables).item(), values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()


class Diagnostics:
    """In a run: diagnoses the updates of one stage, each on rollouts of the team just before it, and on
    rollouts that are not trained on. Without `--diagnostics` it does nothing."""

    def __init__(self, config: Config, team: Team, stage: int):
        self.config, self.team, self.stage = config, team, stage
        self.agents: list[int] = []  # of this update
        self.old: dict[int, list[Tensor]] = {}  # weights at the stage's start, of agents updated since
        self.first: Rollouts | None = None  # of team^0
        self.rollouts: Rollouts | None = None  # of team^{i-1}
        self.found: list[dict] = []  # estimates of the stage's updates, {} without any

    def before(self, i: int, agents: list[int]) -> None:
        """Call just before update number i of the stage, which moves `agents`."""
        config, team, place = self.config, self.team, (self.config.seed, "diagnostics", self.stage)
        if config.diagnostics:
            problems = team.task.sample_problems(config.problems, rng.generator(*place))
            self.rollouts = collect(team, problems, config.group, rng.RngPath(*place, i), "diagnosing")
            self.first, self.agents = self.first or self.rollouts, agents
            self.old |= {j: weights_of(team.agents[j].model) for j in agents}

    @torch.no_grad()
    def after(self) -> dict:
        """Call just after it. Returns what to log: no estimates where a router left the agents out."""
        if not self.config.diagnostics:
            return {}
        now, both = self.rollouts, (self.rollouts.messages, self.first.messages)
        none = [False] * self.team.turns  # tools take turns, but are no policies
        acts = [[[m.agent in self.agents for m in x if m.tokens] + none for x in rows] for rows in both]
        writes, wrote = (torch.tensor([row[: len(none)] for row in rows]) for rows in acts)  # (R, turns)
        self.found.append(self._estimates(writes, wrote) if writes.any() and wrote.any() else {})
        cost = {"rollouts": len(now.messages), "tokens_sampled": now.tokens_sampled, "seconds": now.seconds}
        return self.found[-1] | {f"{name}_diagnostics": value for name, value in cost.items()}

    def of_stage(self) -> dict:
        """Thm 3.6: the sum of the updates' bounds; `vacuous`: the penalty is more than returns in [0, 1] can
        lose; `delta_stale`: the mean |gap| of all updates but the first, whose gap is 0."""
        if not (diagnosed := [found for found in self.found if found]):
            return {}
        sums = {key: sum(found[key] for found in diagnosed) for key in ("certificate", "bound", "penalty")}
        gaps = [abs(found["gap"]) for found in self.found[1:] if found]
        stale = sum(gaps) / len(gaps) if gaps else None
        return {"vacuous": sums.pop("penalty") > 1, "delta_stale": stale} | sums

    def _estimates(self, writes: Tensor, wrote: Tensor) -> dict:
        group, seed, returns = self.rollouts.group_size, self.config.seed, self.rollouts.grouped_returns
        log_w = self._log_ratio(self.rollouts, self.agents)
        earlier = [j for j in self.old if j not in self.agents]
        log_rho, drift = (before_turn(self._log_ratio(r, earlier)) for r in (self.rollouts, self.first))
        found = {}
        for name, statistic, *tables in (
            ("surrogate", torch.mean, surrogate_terms(returns, log_w, writes)),
            ("gap", torch.mean, gap_terms(returns, log_w, log_rho, writes)),
            ("occupancy_shift", occupancy_shift, drift, wrote),
            ("ess", effective_sample_share, drift, wrote),
            ("kl_held_out", message_kl, log_w, writes),
        ):
            found[name], found[f"{name}_ci"] = bootstrap(statistic, *tables, group=group, seed=seed)
        (low, high), kl = found["surrogate_ci"], max(found["kl_held_out"], 0.0)
        zeta = (1 - GAMMA) * (high - low) / 2  # on the scale of one advantage: Thm 3.4 divides it again
        penalty = penalty_constant() * math.sqrt(kl) + zeta / (1 - GAMMA)
        turns = writes.sum(1).float()  # (R,) messages of the agents in each rollout
        # An agent that writes one message cannot move the states it acts in: L^seq is its gain exactly.
        several = -math.sqrt(turns.mean().item() * max(found["kl_held_out_ci"][1], 0.0) / 2)
        found |= {"bound": low if turns.max() <= 1 else several, "zeta": zeta, "penalty": penalty}
        return found | {"certificate": found["surrogate"] - penalty}

    def _log_ratio(self, rollouts: Rollouts, agents: list[int]) -> Tensor:
        """(R, turns) log-prob of these agents' messages, minus by their old weights; exp fits into fp64."""
        table = torch.zeros(len(rollouts.messages), self.team.turns, dtype=torch.double)
        for j in agents:
            table += message_logps(self.team, rollouts, j, self.config.batch_tokens)
            with swapped(self.team.agents[j].model, self.old[j]):
                table -= message_logps(self.team, rollouts, j, self.config.batch_tokens)
        return table


def weights_of(model: Transformer) -> list[Tensor]:
    """A copy of the weights that are trained."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def swapped(model: Transformer, weights: list[Tensor]) -> Iterator[None]:
    """Within, the model has these weights in place of its own."""
    trained, own = [p.detach() for p in model.parameters() if p.requires_grad], weights_of(model)
    try:
        for p, old in zip(trained, weights):
            p.copy_(old)
        yield
    finally:
        for p, kept in zip(trained, own):
            p.copy_(kept)


@torch.no_grad()
def message_logps(team: Team, rollouts: Rollouts, j: int, batch_tokens: int) -> Tensor:
    """(R, turns) fp32 log-probs of the messages of agent j, 0 at others' turns."""
    table, model = torch.zeros(len(rollouts.messages), team.turns), team.agents[j].model
    none = torch.zeros_like(rollouts.returns)  # no advantage is used here
    batches = agent_batches(team, rollouts, [j], none, batch_tokens).own
    with unsharded(model):
        for batch in batches:
            logp = kernels.linear_logprob(batch.hidden(model), model.head, batch.targets, team.temperature)
            table[batch.rollout.cpu(), batch.turn.cpu()] = batch.per_message(logp[batch.pair]).cpu()
    team.ranks.sum(table)
    return table
