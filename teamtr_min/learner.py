"""The trainable side of an agent: its fp32 masters and optimizer, and Eq. 10 and 11 over its batches.

How far an update goes, and when it goes back, is decided in train.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from teamtr_min.config import Config
from teamtr_min.engine.rounding import round_into
from teamtr_min.objective import trust_region_loss
from teamtr_min.rollout import AgentBatch
from teamtr_min.run.progress import Bar
from teamtr_min.team import Team

OutOfMemory = torch.OutOfMemoryError
BETA_LEAST, BETA_MOST = 1e-4, 1.0
GRADIENT_NORM = 1.0


class Diverged(Exception):
    """A loss, gradient or weight is not finite. The agent is back at its last accepted weights."""


class Update(NamedTuple):
    """What became of one update; the dicts are from `evaluate`, empty where there was no message."""

    first: dict[str, float] = {}  # at pi_old
    attempted: dict[str, float] = {}  # after the last step, before the radius was enforced
    kept: dict[str, float] = {}  # at the weights that the agent has now
    steps: int = 0
    halvings: int = 0  # of the last step; HALVINGS + 1: none of them was inside, and the step was undone
    grad_norm: float | None = None  # of the last step's gradient, before clipping
    lr: float = 0.0
    beta: float = 0.0  # that this update used
    tokens: int = 0  # trainable tokens times steps


class Snapshot(NamedTuple):
    """Masters and optimizer state at one moment."""

    masters: list[Tensor]
    state: list[dict[str, Tensor]]


class Learner:
    """One agent, or several that step together: fp32 masters, AdamW and the penalty's weight beta.

    The model's own parameters are what samples and what is measured. In fp32 they are the masters themselves;
    in bf16 the masters are a second copy, and every change of theirs is rounded into the model at once
    (rounding.py), so that the monitor sees exactly the weights that the sampler will use.

    Of several ranks each holds all masters, but Adam's moments only of those that it owns: it steps these and
    sends them to the others (ZeRO-1). Where weights are spread (shards.py) each holds, and steps, its part of
    every tensor: masters, moments and gradients are parts then. What `evaluate` measures is the same number
    on all ranks.
    """

    def __init__(self, team: Team, agents: list[int], beta: float):
        self.agents, self.beta = agents, beta
        self.kl_rate = 0.0  # KL over squared steps from pi_old, as last measured
        self.bar = Bar("training", 0, "batches")  # not on the terminal unless somebody enters one
        self.models = [team.agents[j].model for j in agents]
        named = [(f"{i}.{name}", p) for i, m in enumerate(self.models) for name, p in m.named_parameters()]
        named = [(name, p) for name, p in named if p.requires_grad]  # with LoRA the adapters alone
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.bases = [a.base_sha256 for j in agents if (a := team.agents[j].adapter)]  # frozen, not saved
        self.ranks, self.shards = team.ranks, self.models[0].shards
        self.copied = self.models[0].dtype != torch.float32  # masters are a second copy
        self.weights = [p.to_local() for p in self.parameters] if self.shards else self.parameters
        self.masters = self.weights
        if self.copied:
            self.masters = [p.detach().to(self.models[0].dtype).float() for p in self.weights]
        self.owners = self.ranks.owners([p.numel() for p in self.masters])
        if self.shards:
            self.masters = [p.detach() for p in self.masters]
            self.owners = [self.ranks.rank] * len(self.masters)
            self._round()  # parts are loaded in fp32, and stand for what bf16 holds
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.offload()

    @property
    def trained(self) -> int:
        """Parameters that an update changes."""
        return sum(p.numel() for p in self.parameters)

    @property
    def finite(self) -> bool:
        """Whether every weight is, on all ranks."""
        held = (p.detach() for p in self.masters if p.numel())
        return not self.ranks.any(not all(bound.isfinite() for p in held for bound in p.aminmax()))

    def step(self, lr: float) -> float:
        """One optimizer step on the gradients added up so far, on all ranks; their norm before clipping."""
        self._sum_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.masters if p.grad is not None])
        if self.shards:
            norm = torch.tensor(math.sqrt(self.ranks.total(norm.item() ** 2)))
        torch.nn.utils.clip_grads_with_norm_(self.masters, GRADIENT_NORM, norm)
        norm = norm.item()
        if not math.isfinite(norm):
            raise Diverged("the gradient is not finite")
        self.optimizer.param_groups[0]["lr"] = lr
        stepped = [(p, owner) for p, owner in zip(self.masters, self.owners) if p.grad is not None]
        for p, owner in stepped:
            if owner != self.ranks.rank:
                p.grad = None
        self.optimizer.step()
        if not self.shards:
            self.ranks.broadcast([p.detach() for p, _ in stepped], [owner for _, owner in stepped])
        self._clear_gradients()
        self._round()
        return norm

    def clone_masters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy of masters and optimizer state; in the memory of `into`, an earlier one, if given."""
        taken = into or Snapshot([torch.empty_like(p) for p in self.masters], [{} for _ in self.masters])
        for i, p in enumerate(self.masters):
            taken.masters[i].copy_(p)
            taken.state[i].clear()
            taken.state[i].update({name: value.clone() for name, value in self.optimizer.state[p].items()})
        return taken

    @torch.no_grad()
    def restore(self, base: Snapshot, toward: list[Tensor] | None = None, fraction: float = 0.0) -> None:
        """Go to base + fraction * (toward - base), with the optimizer state of `base` and no gradients."""
        for i, p in enumerate(self.masters):
            p.copy_(base.masters[i] if toward is None else base.masters[i].lerp(toward[i], fraction))
            self.optimizer.state[p] = {name: value.clone() for name, value in base.state[i].items()}
        self._clear_gradients()
        self._round()

    def onload(self) -> None:
        """Bring what only updates need to the model's device."""
        self._move(self.models[0].device)

    def offload(self) -> None:
        """Adam's moments, and masters that are a second copy, wait on the host: the device is for others."""
        self._move("cpu")

    def add_gradients(self) -> None:
        """Move the model's gradients into the masters', which sum them in fp32; call after each backward."""
        if self.copied and not self.shards:
            for master, p in zip(self.masters, self.parameters):
                if p.grad is not None:  # of those that step together, one has the batch
                    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                    p.grad = None

    def whole(self, i: int, x: Tensor) -> Tensor:
        """On the host, given what this rank has of master i or of a moment of it; only the first rank gets it
        where weights are spread, and all have to ask."""
        if self.shards and x.dim():
            x = self.shards.whole(x, self.parameters[i])
            return x.cpu() if self.ranks.first else x.new_empty(0)
        return x.cpu()

    def part(self, i: int, x: Tensor) -> Tensor:
        """What this rank keeps of x, which is a whole master i or a moment of it."""
        return self.shards.part(x, self.parameters[i]) if self.shards and x.dim() else x

    def adapt_beta(self, attempted: float, delta: float) -> None:
        """[ours] Follow the overshoot of the attempted update, within bounds; a beta of 0 stays off, and
        without a radius there is nothing to follow."""
        if self.beta == 0 or math.isinf(delta):
            return
        if attempted > 1.5 * delta:
            self.beta *= 1.5
        elif attempted < delta / 1.5:
            self.beta /= 1.5
        self.beta = min(max(self.beta, BETA_LEAST), BETA_MOST)

    def _sum_gradients(self) -> None:
        """Of what each rank has from its own rollouts; where none has a gradient there is none."""
        if self.shards:  # they are sums already, in parts
            for master, p in zip(self.masters, self.parameters):
                master.grad = None if p.grad is None else p.grad.to_local()
        if self.ranks.size == 1 or self.shards:
            return
        count = torch.tensor([p.grad is not None for p in self.masters]).int()
        self.ranks.sum([count])
        summed = [p for p, ranks in zip(self.masters, count.tolist()) if ranks]
        for p in summed:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.sum([p.grad for p in summed])

    def _clear_gradients(self) -> None:
        for p in (*self.masters, *self.parameters):
            p.grad = None

    @torch.no_grad()
    def _round(self) -> None:
        if self.copied:
            for weight, master, p in zip(self.weights, self.masters, self.parameters):
                round_into(weight, master, self.shards.offset(p) if self.shards else 0)

    def _move(self, device: torch.device | str) -> None:
        if self.copied:
            for p in self.masters:
                p.data = p.data.to(device)
        for state in self.optimizer.state.values():
            state |= {name: value.to(device) for name, value in state.items() if name != "step"}


class OldLogps(NamedTuple):
    """log pi_old of one batch, read from the trainer's own forward pass before the first step."""

    token: Tensor  # (N,) fp32, of the sampled tokens


def evaluate(
    learner: Learner,
    batches: list[AgentBatch],
    config: Config,
    old_logps: list[OldLogps] | None = None,
    *,
    grad: bool,
) -> tuple[dict[str, float], list[OldLogps]]:
    """Eq. 10 and 11 over all batches of all ranks; with `grad`, the loss's gradient is added to the masters.

    Returns what was measured, and `old_logps`, one entry per batch. Called without them this pass makes them:
    the policy is pi_old itself, so every ratio is exactly 1. It then also measures the entropy, and how far
    the sampler's log-probs are from the trainer's. Raises Diverged when anything measured is not finite.
    """
    first = old_logps is None
    messages = learner.ranks.total(sum(len(batch.advantage) for batch in batches))
    tokens = learner.ranks.total(sum(len(batch.pair) for batch in batches))
    sums, ratio_max, mismatch_max, made = {}, [], [], []
    learner.bar.expect(len(batches))

    def add(name: str, value: Tensor, share: float) -> None:
        sums[name] = sums.get(name, 0.0) + value.detach() * share

    pulling = [bool(batch.advantage.any()) for batch in batches]
    climbing = {batch.model for batch, pulls in zip(batches, pulling) if pulls}
    with learner.models[0].in_step(grad):
        for batch, pulls, old in zip(batches, pulling, old_logps or [None] * len(batches)):
            share = len(batch.advantage) / messages  # Eq. 10 and 11 are means over all messages of the agent
            model = batch.model
            # Without advantages only the penalty has a gradient, and that is 0 at pi_old. A model that has
            # nothing else gets its zeros all the same: they let Adam's moments decay. Of spread weights
            # all ranks have to go back at each batch.
            penalised, spread = not first and learner.beta > 0, model.shards is not None
            needed = grad and (pulls or penalised or model not in climbing or spread)
            with torch.set_grad_enabled(needed):
                hidden = batch.hidden(model)  # (pairs, H)
                new = kernels.linear_logprob_stats(
                    hidden, model.head, batch.targets, config.temperature, entropy=first
                )
                logp = new.logp[batch.pair]  # (N,)
                if first:
                    old = OldLogps(logp.detach())
                    mismatch = (batch.sampled_logp - old.token).abs()
                    add("entropy", new.entropy[batch.pair].sum(), 1 / tokens)
                    add("sampler_mismatch", mismatch.sum(), 1 / tokens)
                    mismatch_max.append(mismatch.max())
                loss, stats = trust_region_loss(
                    logp,
                    old.token,
                    batch.message,
                    batch.advantage,
                    clip=config.clip,
                    beta=learner.beta,
                    ratio=config.ratio,
                    kl_unit=config.kl_unit,
                )
                if needed:
                    (loss * share).backward()
                    learner.add_gradients()
            made.append(old)
            add("loss", loss, share)
            for name in ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean"):
                add(name, stats[name][0], share)
            ratio_max.append(stats["ratio_max"][0])
            learner.bar.advance(1, len(batch.pair))
    measured = {}
    if batches:
        sums["ratio_max"] = torch.stack(ratio_max).max()
        if first:
            sums["sampler_mismatch_max"] = torch.stack(mismatch_max).max()
        measured = dict(zip(sums, torch.stack(list(sums.values())).tolist()))  # the one device sync
    if learner.ranks.size > 1:
        parts = [part for part in learner.ranks.gather(measured) if part]  # a rank without batches has none
        measured = {
            name: (max if name.endswith("_max") else sum)(part[name] for part in parts) for name in parts[0]
        }
    for name, value in measured.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value}")
    return {"kl": measured[f"kl_{config.kl_estimator}"], **measured}, made
