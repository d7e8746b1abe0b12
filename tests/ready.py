"""A small team with rollouts, ready for an update."""

import torch

import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.learner import Learner, Update
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import Rollouts, agent_batches, collect
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import load_task
from teamtr_min.team import Team


def team_of(**knobs) -> tuple[Config, Team]:
    config = Config(**{"device": "cpu"} | knobs)
    return config, build_team(config, load_task(config))


def play(path: rng.RngPath | None = None, **knobs) -> tuple[Team, Rollouts]:
    """Rollouts of five problems."""
    config, team = team_of(**knobs)
    problems = team.task.sample_problems(5, rng.generator(0, "problems"))
    return team, collect(team, problems, config.group, path or rng.RngPath(0, "train", 0, 0))


class Prepared:
    """Two agents, 72 rollouts of relay, and a learner of `updated` (agent 0 unless named)."""

    def __init__(self, updated: list[int] | None = None, **changes):
        defaults = {"agents": 2, "problems": 12, "group": 6, "inner_steps": 4, "batch_tokens": 4096}
        self.config, self.team = team_of(**defaults | changes)
        config, updated = self.config, updated or [0]
        problems = self.team.task.sample_problems(config.problems, rng.generator(config.seed, "problems"))
        self.rollouts = collect(self.team, problems, config.group, rng.RngPath(config.seed, "train", 0, 0))
        self.advantages = group_advantages(self.rollouts.grouped_returns, config.advantage_clip).flatten()
        self.learner = Learner(self.team, updated, config.first_beta)
        self.model = self.learner.models[0]
        self.batches = self.batch(self.rollouts)

    def batch(self, rollouts: Rollouts, advantages: torch.Tensor | None = None):
        advantages = self.advantages if advantages is None else advantages
        return agent_batches(self.team, rollouts, self.learner.agents, advantages, self.config.batch_tokens)

    def update(self, lr: float | None = None) -> Update:
        return train.update(self.learner, self.batches, self.config, self.config.lr if lr is None else lr)
