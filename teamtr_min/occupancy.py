"""When things happen in a stage: the order of updates, their learning rate, and the rollouts they train on.

An update's surrogate must be evaluated under the team as it now is. The paper samples that team again before
every update. [paper] The stage's first rollouts can be used again instead, if each is weighted by the density
ratio of the agents that have changed since: [ours]

    rho_r = prod over updated agents k, over messages m of k in rollout r, of pi_k now(m) / pi_k then(m)
    E_then[rho f] = E_now[f] for every f;   ESS = (sum rho)^2 / (R sum rho^2)
"""

import dataclasses
import math

import torch
from torch import Tensor

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.tasks import Problem
from teamtr_min.team import Team


def update_groups(config: Config, team: Team) -> list[list[int]]:
    """The updates of one stage, each by the agents that step together: one, or with `joint` all of them."""
    trained = [j for j, agent in enumerate(team.agents) if agent.model is not None]
    return [trained] if config.occupancy == "joint" else [[j] for j in trained]


def update_order(config: Config, stage: int, updates: int) -> list[int]:
    """The order in which a stage makes its updates; the guarantee holds for any [paper]."""
    order = list(range(updates))[:: -1 if config.order == "reversed" else 1]
    if config.order == "random":
        rng.generator(config.seed, "order", stage).shuffle(order)
    return order


def learning_rate(config: Config, done: float) -> float:
    """Cosine decay from lr to lr_end * lr; `done` is the share of the run's updates that are made."""
    decayed = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.lr_end + (1 - config.lr_end) * decayed)


class RolloutSource:
    """Hands out the rollouts that each update of one stage trains on. `min_ess` 1 collects before every
    update, 0 once a stage; between them, it collects when the effective share of the weighted rollouts has
    fallen below it. `stale` and `joint` rollouts carry no weights."""

    def __init__(self, config: Config, team: Team, problems: list[Problem], stage: int):
        self.config, self.team, self.problems, self.stage = config, team, problems, stage
        self.rollouts: Rollouts | None = None  # the latest

    def of_update(self, i: int) -> Rollouts:
        """The rollouts of update i, from 0; those that an earlier update trained on are marked `reused`."""
        least = self.config.min_ess
        if self.rollouts is None or least == 1 or self.rollouts.ess < least:
            path = rng.RngPath(self.config.seed, "train", self.stage, i)
            self.rollouts = collect(self.team, self.problems, self.config.group, path)
        else:
            self.rollouts = dataclasses.replace(self.rollouts, reused=True, seconds=0.0)
        return self.rollouts

    def updated(self, log_ratio: Tensor | float) -> None:
        """Reweight to the team after an update. log_ratio (R,): log pi_now - log pi_then of the agents'
        messages in each rollout, which the update's last forward pass has measured."""
        if self.config.occupancy == "corrected":
            before = self.rollouts.log_weights
            before = torch.zeros_like(self.rollouts.returns) if before is None else before
            self.rollouts = dataclasses.replace(self.rollouts, log_weights=before + log_ratio)
