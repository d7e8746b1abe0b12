"""`--diagnostics`: what each update of a run was worth, estimated on rollouts of its own."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import unsharded
from teamtr_min.engine.model import Transformer
from teamtr_min.extras import certificate
from teamtr_min.extras.certificate import GAMMA, before_turn, bootstrap
from teamtr_min.rollout import AgentBatch, Rollouts, agent_batches, collect
from teamtr_min.team import Team


class NoDiagnostics:
    """What a run without `--diagnostics` has in their place."""

    def before(self, i: int, agents: list[int]) -> None:
        pass

    def after(self) -> dict:
        return {}

    def of_stage(self) -> dict:
        return {}


class Diagnostics:
    """Diagnoses the updates of one stage, each on rollouts of the team just before it.

    Keeps the weights of all agents at the start of the stage, and of those in an update just before it. Its
    problems are not those that are trained on.
    """

    def __init__(self, config: Config, team: Team, stage: int):
        self.config, self.team, self.stage = config, team, stage
        problems = rng.generator(config.seed, "diagnostics", stage)
        self.problems = team.task.sample_problems(config.problems, problems)
        self.start = [weights_of(agent.model) if agent.model else [] for agent in team.agents]
        self.updated: list[int] = []
        self.first: Rollouts | None = None  # of team^0
        self.found: list[dict] = []  # of each update that could be diagnosed

    def before(self, i: int, agents: list[int]) -> None:
        """Call just before update number i of the stage, which moves `agents`."""
        self.update = i
        path = rng.RngPath(self.config.seed, "diagnostics", self.stage, i)
        group = self.config.group
        self.rollouts = collect(self.team, self.problems, group, path, label="diagnosing")
        self.first = self.first or self.rollouts
        self.agents = agents
        self.old = {j: weights_of(self.team.agents[j].model) for j in agents}

    @torch.no_grad()
    def after(self) -> dict:
        """Call just after it; what metrics.jsonl keeps of the diagnosis, estimates absent if it has none."""
        cost = {
            "rollouts_diagnostics": self.rollouts.count_sampled,
            "tokens_sampled_diagnostics": self.rollouts.tokens_sampled,
            "seconds_diagnostics": self.rollouts.seconds,
        }
        group, seed = self.rollouts.group_size, self.config.seed
        writes, wrote = self._writes(self.rollouts), self._writes(self.first)
        if not writes.any() or not wrote.any():  # a router left the agent out: nothing to measure
            self.updated += self.agents
            return cost
        log_w = self._log_ratio(self.rollouts, self.old)
        start = {k: self.start[k] for k in self.updated}
        log_rho = before_turn(self._log_ratio(self.rollouts, start))
        terms = certificate.surrogate_terms(self.rollouts.grouped_returns, log_w, writes)
        gap = certificate.gap_terms(self.rollouts.grouped_returns, log_w, log_rho, writes)
        drift = before_turn(self._log_ratio(self.first, start))

        surrogate, (low, high) = bootstrap(lambda x: x.mean(), terms, group=group, seed=seed)
        zeta = (1 - GAMMA) * (high - low) / 2  # on the scale of one advantage: Thm 3.4 divides it again
        kl, (kl_low, kl_high) = bootstrap(certificate.message_kl, log_w, writes, group=group, seed=seed)
        penalty = certificate.penalty_constant() * math.sqrt(max(kl, 0.0)) + zeta / (1 - GAMMA)
        turns = writes.sum(1).float()  # (R,) messages of the agent in each rollout
        # One message at most: an agent's own update cannot move the states it acts in, and L^seq is exact.
        bound = low if turns.max() <= 1 else -math.sqrt(turns.mean().item() * max(kl_high, 0.0) / 2)
        found = {"surrogate": surrogate, "surrogate_ci": [low, high], "zeta": zeta}
        found |= {"kl_held_out": kl, "kl_held_out_ci": [kl_low, kl_high]}
        for name, statistic, *tables in (
            ("gap", lambda x: x.mean(), gap),
            ("occupancy_shift", certificate.occupancy_shift, drift, wrote),
            ("ess", certificate.effective_sample_share, drift, wrote),
        ):
            found[name], found[f"{name}_ci"] = bootstrap(statistic, *tables, group=group, seed=seed)
        self.updated += self.agents
        found |= {"certificate": surrogate - penalty, "penalty": penalty, "bound": bound}
        self.found.append({"update": self.update, **found})
        return found | cost

    def of_stage(self) -> dict:
        """The certificate of the whole stage, after its last update."""
        return certificate.stage_certificate(self.found) if self.found else {}

    def _writes(self, rollouts: Rollouts) -> Tensor:
        """(R, turns) bool: a message of an agent that was updated."""
        return torch.tensor([[m.agent in self.agents for m in messages] for messages in rollouts.messages])

    def _log_ratio(self, rollouts: Rollouts, old: dict) -> Tensor:
        """(R, turns): log-prob of each message of agents as they are now, minus with their `old` weights."""
        table = torch.zeros(
            len(rollouts.messages), self.team.turns, dtype=torch.double
        )  # exp never overflows
        for j, weights in old.items():
            table += message_logps(self.team, rollouts, j, self.config)
            with replaced_weights(self.team.agents[j].model, weights):
                table -= message_logps(self.team, rollouts, j, self.config)
        return table


def weights_of(model: Transformer) -> list[Tensor]:
    """A copy of all weights that are trained."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def replaced_weights(model: Transformer, weights: list[Tensor]) -> Iterator[None]:
    """Within, the model has these weights in place of its own."""
    trained, own = [p for p in model.parameters() if p.requires_grad], weights_of(model)

    def set_to(values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(trained, values):
                p.copy_(value)

    try:
        set_to(weights)
        yield
    finally:
        set_to(own)


@torch.no_grad()
def message_logps(team: Team, rollouts: Rollouts, j: int, config: Config) -> Tensor:
    """(R, turns) log-probs of the messages of agent j, 0 at others' turns."""
    table = torch.zeros(len(rollouts.messages), team.turns)
    none = torch.zeros_like(rollouts.returns)
    model, batches = team.agents[j].model, agent_batches(team, rollouts, [j], none, config.batch_tokens)
    with unsharded(model):
        for batch in (b for b in batches.own if isinstance(b, AgentBatch)):
            logp = kernels.linear_logprob(batch.hidden(model), model.head, batch.targets, team.temperature)
            rows = batch.rollout.unique_consecutive().tolist()  # messages of a rollout stand in turn order
            turns = [t for r in rows for t, m in enumerate(rollouts.messages[r]) if m.agent == j]
            table[batch.rollout.cpu(), turns] = batch.per_message(logp[batch.pair]).cpu()
    team.ranks.sum([table])
    return table
