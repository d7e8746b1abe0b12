"""Runs of the whole program small enough for a test, in this process."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.learner import Learner, Update
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import Batches, Rollouts, agent_batches, collect
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Relay
from teamtr_min.team import Team

# 3 agents, 2 stages, 12 rollouts per collection; steps large enough that every agent changes its messages.
TOY = ["--agents", "3", "--stages", "2", "--problems", "3", "--group", "4", "--inner-steps", "2",
       "--eval-problems", "8", "--lr", "3e-3", "--delta", "0.5", "--device", "cpu"]  # fmt: skip


def parity(task, problem, messages) -> float:
    """A grade that half of all rollouts get: few groups this small would have both outcomes otherwise."""
    return float(sum(messages[-1].tokens) % 2)


class Prepared(NamedTuple):
    """A team of two with rollouts, ready for an update."""

    config: Config
    team: Team
    learner: Learner
    rollouts: Rollouts

    @property
    def model(self):
        return self.learner.models[0]

    @property
    def batches(self) -> Batches:
        """New ones each time: a batch keeps pi_old of its first pass."""
        returns, weights = self.rollouts.grouped_returns, self.rollouts.grouped_weights
        advantages = group_advantages(returns, self.config.advantage_clip, weight=weights).flatten()
        tokens = self.config.batch_tokens or 4096
        return agent_batches(self.team, self.rollouts, self.learner.agents, advantages, tokens)

    def update(self, lr: float | None = None) -> Update:
        return train.update(self.learner, self.batches, self.config, self.config.lr if lr is None else lr)


def prepared(updated: list[int] | None = None, **changes) -> Prepared:
    """For an update of these agents, by default agent 0; `changes` are fields of Config."""
    defaults = {"agents": 2, "problems": 12, "group": 6, "inner_steps": 4, "device": "cpu"}
    config = Config(**defaults | changes)
    team = build_team(config, Relay(config))
    problems = team.task.sample_problems(config.problems, rng.generator(config.seed, "problems"))
    rollouts = collect(team, problems, config.group, rng.RngPath(config.seed, "train", 0, 0))
    return Prepared(config, team, Learner(team, updated or [0], config.first_beta), rollouts)


def run(out: Path, *flags: str) -> tuple[dict, list[dict], list[dict]]:
    """Train in this process; returns the summary, the updates and the stages."""
    assert train.main([*TOY, "--out", str(out), *flags]) == 0
    return results(out)


def results(out: Path) -> tuple[dict, list[dict], list[dict]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    by_kind = ([m for m in metrics if m["kind"] == kind] for kind in ("update", "stage"))
    return json.loads((out / "summary.json").read_text()), *by_kind


def timeless(records: list[dict]) -> list[dict]:
    """Without what two equal runs differ in."""
    varying = "seconds", "memory"
    return [{k: v for k, v in record.items() if not k.startswith(varying)} for record in records]


def weights(out: Path) -> list[dict]:
    return [load_file(out / "agents" / str(j) / "model.safetensors") for j in range(3)]


def same(a: list[dict], b: list[dict]) -> bool:
    return all(torch.equal(p[name], q[name]) for p, q in zip(a, b) for name in p)


def bits(out: Path) -> tuple:
    """All that two equal runs have in common: logs and summary but for times, agents, the last checkpoint."""
    logs = [
        line for records in results(out) for line in ([records] if isinstance(records, dict) else records)
    ]
    files = [*out.glob("agents/*/*"), *sorted(out.glob("checkpoints/*"))[-1].glob("*.safetensors")]
    held = {str(file.relative_to(out)): file.read_bytes() for file in files}
    return timeless(logs), (out / "transcripts.jsonl").read_bytes(), held
