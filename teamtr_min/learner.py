"""The trainable side of an agent: fp32 masters, AdamW, snapshots, and Eq. 10 and 11 over its batches."""

import collections
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

import kernels
from teamtr_min.config import Config
from teamtr_min.engine.distributed import local, unsharded, whole
from teamtr_min.engine.rounding import round_into
from teamtr_min.objective import teamtr_loss
from teamtr_min.rollout import Batches
from teamtr_min.team import Team

BETA_LEAST, BETA_MOST = 1e-4, 1.0
GRADIENT_NORM = 1.0
ROUNDING = 1e-6  # a smaller gradient is what rounding has left; Adam would make a full step of it


class Diverged(Exception):
    """A loss, gradient or weight is not finite. Such a step is undone."""


class Measured(NamedTuple):  # Eq. 10 and 11 over all batches, at the weights of one moment
    stats: dict[str, float]  # means over messages; "kl" is the estimate that the radius is enforced on
    log_ratio: Tensor  # (R,) fp32: sum of log pi_now - log pi_old over the agents' tokens in each rollout

    @property
    def kl(self) -> float:
        return self.stats["kl"]


class Update(NamedTuple):
    """The course of one update; the dicts are `Measured.stats`, empty where the agent wrote no message."""

    first: dict[str, float] = {}  # at pi_old
    attempted: dict[str, float] = {}  # after the last step, before the radius was enforced
    kept: dict[str, float] = {}  # at the weights that the agent has now
    log_ratio: Tensor | float = 0.0  # (R,) at these weights: see Measured
    steps: int = 0
    halvings: int = 0  # of the last step; HALVINGS + 1 where the step was undone
    grad_norm: float | None = None  # of the last step's gradient, before clipping
    lr: float = 0.0
    beta: float = 0.0  # weight of the KL penalty in this update
    tokens: int = 0  # trainable tokens times steps


class Snapshot(NamedTuple):  # of one moment
    masters: list[Tensor]
    state: list[dict[str, Tensor]]


class Learner:
    """One agent, or several that step together: fp32 masters, AdamW and the penalty's weight beta.

    The model's own parameters sample and are measured. In fp32 they are the masters themselves. In bf16 the
    masters are a second copy, and each change of a master is rounded into the model at once (rounding.py):
    the monitor then measures the weights that the sampler will use. With LoRA only adapters are trained.

    With several processes every tensor here is a DTensor, sharded over them (engine/distributed.py). With
    `offload` Adam's moments and bf16 masters wait in host memory between updates."""

    def __init__(self, team: Team, agents: list[int], beta: float, offload: bool = False):
        self.agents, self.beta, self.ranks, self.offloads = agents, beta, team.ranks, offload
        self.models = [team.agents[j].model for j in agents]
        named = [(f"{i}.{name}", p) for i, m in enumerate(self.models) for name, p in m.named_parameters()]
        self.names, self.parameters = zip(*((name, p) for name, p in named if p.requires_grad))
        self.copied = self.models[0].dtype != torch.float32
        self.masters = self.parameters
        if self.copied:
            self.masters = [p.detach().to(self.models[0].dtype, copy=True).float() for p in self.parameters]
            self._round()
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.offload()

    def measure(self, batches: Batches, config: Config) -> Measured:
        """Eq. 10 and 11 at the weights as they are, by a forward pass over all batches. The first pass over a
        batch stores log pi_old in it (`AgentBatch.old_logp`), so every ratio is then exactly 1; it also
        measures entropy, and how far the sampler's log-probs are from the trainer's. Raises Diverged."""
        with torch.no_grad(), unsharded(*self.models):
            return self._forward(batches, config, backward=False)

    def backward(self, batches: Batches, config: Config) -> Measured:
        """The same; also adds the gradient of the loss, minus Eq. 10, to the masters'."""
        with unsharded(*self.models):
            return self._forward(batches, config, backward=True)

    def step(self, lr: float) -> float:
        """One optimizer step on the gradients added up so far. Returns their norm before clipping."""
        gradients = [p.grad for p in self.masters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(self.masters, GRADIENT_NORM, norm)
        if not math.isfinite(norm := norm.item()):
            raise Diverged("the gradient is not finite")
        self.optimizer.param_groups[0]["lr"] = lr
        if norm > ROUNDING:
            self.optimizer.step()
        self._clear_gradients()
        self._round()
        return norm

    def clone_masters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy of masters and optimizer state; in the memory of `into`, an earlier snapshot, if given."""
        into = into or Snapshot([torch.empty_like(p) for p in self.masters], [{} for _ in self.masters])
        for p, master, state in zip(self.masters, *into):
            master.copy_(p)
            for name, value in self.optimizer.state[p].items():
                state[name] = state[name].copy_(value) if name in state else value.clone()
        return into

    @torch.no_grad()
    def restore(self, base: Snapshot, toward: list[Tensor] | None = None, fraction: float = 0.0) -> None:
        """Go to base + fraction * (toward - base), with the optimizer state of `base` and no gradients."""
        for i, p in enumerate(self.masters):
            p.copy_(base.masters[i] if toward is None else base.masters[i].lerp(toward[i], fraction))
            self.optimizer.state[p] = {name: value.clone() for name, value in base.state[i].items()}
        self._clear_gradients()
        self._round()

    def onload(self) -> None:
        """Bring Adam's moments and masters to the model's device, before an update."""
        self._move(self.models[0].device)

    def offload(self) -> None:
        """Let them wait on the host, where the memory plan says that the device cannot hold them."""
        if self.offloads:
            self._move("cpu")
            if (device := self.models[0].device).type == "cuda":
                torch.cuda.synchronize(device)  # before the host reads what comes

    def adapt_beta(self, attempted: float, delta: float) -> None:
        """[ours] Follow the KL of the attempted update, within bounds; a beta of 0 stays 0."""
        if self.beta and math.isfinite(delta):
            factor = 1.5 if attempted > 1.5 * delta else 1 / 1.5 if attempted < delta / 1.5 else 1.0
            self.beta = min(max(self.beta * factor, BETA_LEAST), BETA_MOST)

    def _forward(self, batches: Batches, config: Config, backward: bool) -> Measured:
        estimate, together, total = f"kl_{config.kl_estimator}", len(self.agents) > 1, sum(batches.weight)
        sums, largest = collections.defaultdict(float), collections.defaultdict(list)
        log_ratio = torch.zeros(batches.rollouts, device=self.models[0].device)
        for batch in tqdm(batches.own, desc="training", unit="batch", delay=1, leave=False, disable=None):
            first = batch.old_logp is None
            # Without advantages only the penalty has a gradient, which is 0 at pi_old. Where agents step
            # together or weights are sharded, each batch goes back all the same.
            idle = not batch.pulls and (first or self.beta == 0) and not together and not batch.model.sharded
            with torch.set_grad_enabled(backward and not idle):
                hidden = batch.hidden(batch.model)  # (pairs, H)
                logp, entropy = kernels.linear_logprob_stats(
                    hidden, batch.model.head, batch.targets, config.temperature, entropy=first
                )
                logp = logp[batch.pair]  # (N,)
                if first:
                    batch.old_logp = logp.detach()
                    mismatch = (batch.sampled_logp - batch.old_logp).abs()
                    sums["entropy"] += entropy[batch.pair].sum() / batches.tokens
                    sums["sampler_mismatch"] += mismatch.sum() / batches.tokens
                    largest["sampler_mismatch_max"].append(F.pad(mismatch, (0, 1)).max())  # it may have none
                place = self.agents.index(batch.agent)
                objective = kernels.trust_region_loss if kernels.use_triton(hidden) else teamtr_loss
                loss, stats = objective(
                    logp, batch.old_logp, batch.message, batch.advantage, weight=batch.weight,
                    agent=torch.full_like(batch.rollout, place), n_agents=len(self.agents),
                    clip=config.clip, beta=self.beta, ratio=config.ratio, kl_unit=config.kl_unit,
                )  # fmt: skip
                share = batch.total_weight / total  # Eq. 10 and 11 are means over all messages
                if backward and not idle:
                    (loss * share).backward()
                    self.add_gradients()
            sums["loss"] += loss.detach() * share
            for name in ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean"):
                sums[name] += stats[name].sum() * share  # (A,), 0 but for the batch's agent
            if together:
                own = batch.total_weight / batches.weight[place]
                sums[f"kl_agent_{batch.agent}"] += stats[estimate][place] * own
            largest["ratio_max"].append(stats["ratio_max"].max())
            log_ratio.index_add_(0, batch.rollout, batch.per_message(logp.detach() - batch.old_logp))
        sums |= {name: torch.stack(values).max() for name, values in largest.items()}
        stats = dict(zip(sums, torch.stack(list(sums.values())).tolist()))  # one device sync
        parts = self.ranks.gather(stats)
        stats = {n: (max if n.endswith("_max") else sum)(part[n] for part in parts) for n in stats}
        log_ratio = log_ratio.cpu()
        self.ranks.sum(log_ratio)
        if wrong := [f"{name} is {value}" for name, value in stats.items() if not math.isfinite(value)]:
            raise Diverged(wrong[0])
        return Measured({"kl": stats[estimate], **stats}, log_ratio)

    def add_gradients(self) -> None:
        """Move the model's gradients into the masters', which sum them in fp32; call after each backward."""
        for master, p in zip(self.masters, self.parameters) if self.copied else ():
            if p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    def _clear_gradients(self) -> None:
        for p in (*self.masters, *self.parameters):
            p.grad = None

    @torch.no_grad()
    def _round(self) -> None:
        if self.copied:
            for p, master in zip(self.parameters, self.masters):
                round_into(local(p), local(master))

    def _move(self, device: torch.device | str) -> None:
        for p in self.masters if self.copied else ():
            p.data = moved(p.data, device)
        for state in self.optimizer.state.values():
            state |= {name: moved(value, device) for name, value in state.items() if name != "step"}


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """x on another device; copies between a GPU and pinned host memory do not wait for one another."""
    if x.is_cuda and device == "cpu":
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    return x.to(device, non_blocking=True)
