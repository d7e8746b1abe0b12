"""When things happen in a run: who is updated when, on which rollouts, at which learning rate.

The variants of the paper's ablation differ here and in a few numbers of config.py; train.py is the same for
all.
"""

import dataclasses
import math
import time

import torch
from torch import Tensor

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.tasks import Problem
from teamtr_min.team import Team


def update_order(config: Config, stage: int) -> list[int]:
    """The order in which this stage makes its updates; the guarantee holds for any [paper]."""
    order = list(range(len(config.update_groups)))
    if config.order == "reversed":
        order.reverse()
    elif config.order == "random":
        rng.generator(config.seed, "order", stage).shuffle(order)
    return order


def learning_rate(config: Config, stage: int, i: int, agents: list[int]) -> float:
    """Cosine decay from lr to lr_end * lr over all updates of the run, scaled for the agents of this one;
    i counts the updates of the stage."""
    groups = len(config.update_groups)
    decayed = 0.5 * (1 + math.cos(math.pi * (stage * groups + i) / (config.stages * groups)))
    return config.lr_scales[agents[0]] * config.lr * (config.lr_end + (1 - config.lr_end) * decayed)


class RolloutSource:
    """Hands out the rollouts that each update of one stage trains on.

    fresh: collected from the team as it now is, before every update (`--every 1`) or every k-th; stale,
    importance, joint: once, from the team that began the stage.
    """

    def __init__(self, config: Config, task, team: Team, problems: list[Problem], stage: int):
        self.config, self.task, self.team, self.problems, self.stage = config, task, team, problems, stage
        self.every = config.every if config.occupancy == "fresh" else config.agents
        self.weighed: list[int] = []  # with importance: agents after whom others are updated on the same
        if config.occupancy == "importance":
            self.weighed = update_order(config, stage)[:-1]
        self.rollouts: Rollouts | None = None  # the latest
        self.updated_since: set[int] = set()  # agents

    def of_update(self, i: int) -> Rollouts:
        """The rollouts of update i, from 0. Those that an earlier update had cost nothing again."""
        if i % self.every:
            reused = [len(messages) for messages in self.rollouts.messages]
            return dataclasses.replace(self.rollouts, reused=reused, seconds=0.0)
        prefixes = None
        if self.config.resample == "suffix" and self.rollouts:
            # What precedes the updated agents' first turns has the law of the team as it now is, though only
            # marginally, not given the team, whose earlier updates were fitted to it. [ours]
            prefixes = self.rollouts.prefixes_before(self.updated_since)
        path = rng.RngPath(self.config.seed, "train", self.stage, i)
        self.rollouts = collect(self.team, self.task, self.problems, self.config.group, path, prefixes)
        self.updated_since = set()
        self.log_weights = torch.zeros(len(self.rollouts.returns))  # (R,)
        if self.weighed:
            begin = time.perf_counter()
            self.sampled_from = {j: self._message_logps(j) for j in self.weighed}
            seconds = self.rollouts.seconds + time.perf_counter() - begin
            self.rollouts = dataclasses.replace(self.rollouts, seconds=seconds)
        return self.rollouts

    def updated(self, agents: list[int]) -> None:
        """Take note that these agents are others now than those who wrote the latest rollouts."""
        self.updated_since |= set(agents)
        for j in set(agents).intersection(self.weighed):
            self.log_weights += (self._message_logps(j) - self.sampled_from[j]).sum(1)

    @property
    def weights(self) -> Tensor:
        """Importance weights (R,) of the team as it now is on the latest rollouts; their mean is 1."""
        if self.config.occupancy != "importance":
            return torch.ones_like(self.log_weights)
        return self.log_weights.softmax(0) * len(self.log_weights)

    def _message_logps(self, j: int) -> Tensor:
        """(R, turns), under agent j as it now is; 0 where another wrote."""
        return self.rollouts.message_logps(j, self.team.agents[j].model, self.config.batch_tokens)
