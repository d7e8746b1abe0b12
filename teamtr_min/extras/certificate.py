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

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teamtr_min.engine import rng

GAMMA = 0.99  # [ours] the paper's is not public
RESAMPLES = 500


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


def before_turn(log_ratio: Tensor) -> Tensor:
    """(R, turns) log-ratio of each message -> of all messages before it."""
    return F.pad(log_ratio.cumsum(1)[:, :-1], (1, 0))
