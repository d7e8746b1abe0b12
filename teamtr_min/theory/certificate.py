"""What an update is worth and how far the team has drifted from its data: lower bounds and their terms.

All estimators read tables with a row per rollout and a column per turn, (R, turns); the G rollouts of a
problem are neighbours:

    speaks    bool: the agent that was updated, j, wrote this message
    log_w     log pi_new - log pi_old of that message, 0 where another agent wrote
    log_rho   log-likelihood of all messages *before* this turn under team^{i-1}, minus under team^0

team^0 is the team at the start of the stage, team^{i-1} the one that j's update began from. Everything here
is read on rollouts that nothing is trained on.

Checked against enumerable teams (docs/results/estimators.md): unbiased, and the intervals hold while updates
are small. From about 1 nat per message those of the gap, which weighs by 1/rho, cover the truth too rarely,
and ESS/B, which should warn of it, is itself read too high.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.rollout import Rollouts
from teamtr_min.team import Team

GAMMA = 0.99  # [ours] the paper's is not public
RESAMPLES = 500
DIAGNOSIS = (  # of one update, in metrics.jsonl
    "surrogate", "surrogate_ci", "gap", "gap_ci", "occupancy_shift", "occupancy_shift_ci", "ess", "ess_ci",
    "kl_held_out", "kl_held_out_ci", "zeta", "penalty", "certificate", "bound",
)  # fmt: skip


def centred(returns: Tensor) -> Tensor:
    """Returns (P, G) minus the mean of the problem's *other* rollouts: independent, so unbiased. [ours]"""
    return (returns - returns.mean(1, keepdim=True)) * (returns.shape[1] / (returns.shape[1] - 1))


def surrogate_terms(returns: Tensor, log_w: Tensor, speaks: Tensor) -> Tensor:
    """(R,) terms whose mean estimates L^seq, undiscounted: sum over j's turns of (w - 1)(return - baseline).

    Per state E_old[w A] = E_new[A] and E_old[A] = 0, so w - 1 in place of w changes the variance alone.
    """
    return ((log_w.exp() - 1) * speaks).sum(1) * centred(returns).flatten()


def gap_terms(returns: Tensor, log_w: Tensor, log_rho: Tensor, speaks: Tensor) -> Tensor:
    """(R,) terms whose mean estimates the signed gap L^seq - L^stale from rollouts of team^{i-1}.

    A weight of 1/rho turns team^{i-1}'s states into team^0's, with the advantages still team^{i-1}'s.
    """
    shift = (1 - (-log_rho).exp()) * (log_w.exp() - 1) * speaks
    return shift.sum(1) * centred(returns).flatten()


def occupancy_shift(log_rho: Tensor, speaks: Tensor) -> Tensor:
    """D_occ in [0, 1]: total variation between team^{i-1}'s and team^0's states where j acts, turn by turn.

    From rollouts of *team^0*: E|rho - 1| / 2 over j's messages, rho self-normalised within each turn.
    """
    rho = log_rho.exp() * speaks
    mean = rho.sum(0) / speaks.sum(0).clamp(min=1)  # (turns,)
    return ((rho / mean.clamp(min=1e-30) - 1).abs() * speaks).sum() / (2 * speaks.sum().clamp(min=1))


def effective_sample_share(log_rho: Tensor, speaks: Tensor) -> Tensor:
    """ESS/B, a share of j's messages in rollouts of team^0: (sum rho)^2 / (messages * sum rho^2)."""
    drift = log_rho * speaks
    rho = (drift - drift.max()).exp() * speaks  # no overflow; the scale cancels
    return rho.sum().square() / (speaks.sum() * rho.square().sum()).clamp(min=1e-300)


def message_kl(log_w: Tensor, speaks: Tensor) -> Tensor:
    """KL(old || new) per message of j, as the mean of w - 1 - log w: unbiased on rollouts held out. [ours]"""
    return ((log_w.expm1() - log_w) * speaks).sum() / speaks.sum().clamp(min=1)


def penalty_constant(gamma: float = GAMMA, largest_advantage: float = 1.0) -> float:
    """c = sqrt(2) gamma A_max / (1 - gamma)^2 of Prop. 3.3 and Thm 3.4 to 3.7."""
    return math.sqrt(2) * gamma * largest_advantage / (1 - gamma) ** 2


def stage_certificate(updates: list[dict]) -> dict:
    """Thm 3.6 for one stage, from the diagnoses of its updates: the sum of their bounds, each a proxy.

    `vacuous` when the penalty is more than returns in [0, 1] can lose. `delta_stale` is the mean |gap| of all
    updates but the first, whose gap is 0.
    """
    updates = [u for u in updates if u.get("surrogate") is not None]  # of agents that took a turn
    gaps = [abs(u["gap"]) for u in updates if u["update"] > 0]
    return {
        "certificate": sum(u["certificate"] for u in updates),
        "vacuous": sum(u["penalty"] for u in updates) > 1,
        "bound": sum(u["bound"] for u in updates),
        "delta_stale": sum(gaps) / len(gaps) if gaps else None,
    }


def bootstrap(
    statistic: Callable[..., Tensor], *tables: Tensor, group: int, seed: int, resamples: int = RESAMPLES
) -> tuple[float, list[float]]:
    """A statistic of tables (R, ...) and its 95% percentile interval over problems, `group` rows each."""
    problems = len(tables[0]) // group
    chosen = rng.generator(seed, "bootstrap").integers(problems, size=(resamples, problems))
    rows = (torch.from_numpy(chosen)[..., None] * group + torch.arange(group)).flatten(1)  # (resamples, R)
    values = torch.vmap(statistic)(*(table[rows] for table in tables)).double()
    return statistic(*tables).item(), values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def mean_with_interval(values: Tensor, seed: int, resamples: int = RESAMPLES) -> tuple[float, list[float]]:
    """Mean of per-problem values (P,) and its 95% bootstrap interval over problems."""
    return bootstrap(lambda v: v.mean(), values.double(), group=1, seed=seed, resamples=resamples)


class Watch:
    """Diagnoses the updates of one stage, each on rollouts of its own (`--diagnostics`).

    `play(i)` collects rollouts of the team as it now is. Keeps a copy of all models as they were at the start
    of the stage, and of those in an update as they were before it.
    """

    def __init__(self, team: Team, play: Callable[[int], Rollouts], config: Config):
        self.team, self.play, self.config = team, play, config
        self.start = [copy.deepcopy(agent.model) for agent in team.agents]
        self.updated: list[int] = []
        self.first: Rollouts | None = None  # of team^0

    def before(self, i: int, agents: list[int]) -> Rollouts:
        """Call just before update number i of the stage, which moves `agents`; returns what it sampled."""
        self.rollouts = self.play(i)
        self.first = self.first or self.rollouts
        self.agents = agents
        self.old = {j: copy.deepcopy(self.team.agents[j].model) for j in agents}
        return self.rollouts

    @torch.no_grad()
    def after(self) -> dict:
        """Call just after it; returns what metrics.jsonl keeps of the diagnosis."""
        group, seed = self.rollouts.group_size, self.config.seed
        speaks, spoken = self._speaks(self.rollouts), self._speaks(self.first)
        if not speaks.any() or not spoken.any():  # a router left the agent out: nothing to measure
            self.updated += self.agents
            return {}
        log_w = self._log_ratio(self.rollouts, self.old)
        start = {k: self.start[k] for k in self.updated}
        log_rho = before_turn(self._log_ratio(self.rollouts, start))
        terms = surrogate_terms(self.rollouts.grouped_returns, log_w, speaks)
        gap = gap_terms(self.rollouts.grouped_returns, log_w, log_rho, speaks)
        drift = before_turn(self._log_ratio(self.first, start))

        surrogate, (low, high) = bootstrap(lambda x: x.mean(), terms, group=group, seed=seed)
        zeta = (1 - GAMMA) * (high - low) / 2  # on the scale of one advantage: Thm 3.4 divides it again
        kl, (kl_low, kl_high) = bootstrap(message_kl, log_w, speaks, group=group, seed=seed)
        penalty = penalty_constant() * math.sqrt(max(kl, 0.0)) + zeta / (1 - GAMMA)
        turns = speaks.sum(1).float()  # (R,) messages of j in each rollout
        # One message at most: an agent's own update cannot move the states it acts in, and L^seq is exact.
        bound = low if turns.max() <= 1 else -math.sqrt(turns.mean().item() * max(kl_high, 0.0) / 2)
        report = {"surrogate": surrogate, "surrogate_ci": [low, high], "zeta": zeta}
        report |= {"kl_held_out": kl, "kl_held_out_ci": [kl_low, kl_high]}
        for name, statistic, *tables in (
            ("gap", lambda x: x.mean(), gap),
            ("occupancy_shift", occupancy_shift, drift, spoken),
            ("ess", effective_sample_share, drift, spoken),
        ):
            report[name], report[f"{name}_ci"] = bootstrap(statistic, *tables, group=group, seed=seed)
        self.updated += self.agents
        return report | {"certificate": surrogate - penalty, "penalty": penalty, "bound": bound}

    def _speaks(self, rollouts: Rollouts) -> Tensor:
        """(R, T) bool: who was updated speaks here."""
        return torch.tensor([[m.agent in self.agents for m in messages] for messages in rollouts.messages])

    def _log_ratio(self, rollouts: Rollouts, old: dict) -> Tensor:
        """(R, T): log-prob of each message of the agents in `old` as they are now, minus as they were."""
        table = torch.zeros(
            len(rollouts.messages), self.team.turns, dtype=torch.double
        )  # exp never overflows
        for j, model in old.items():
            table += rollouts.message_logp(j, self.team.agents[j].model, self.config)
            table -= rollouts.message_logp(j, model, self.config)
        return table


def before_turn(log_ratio: Tensor) -> Tensor:
    """(R, T) log-ratio of each message -> of all messages before it."""
    return F.pad(log_ratio.cumsum(1)[:, :-1], (1, 0))
