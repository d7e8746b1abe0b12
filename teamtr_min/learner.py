"""One agent's trust-region update: climb Eq. 10, but no farther from the old policy than the radius.

    old ──step──> accepted ──step──> accepted ──step──> outside: back along this step by halves, until inside

The forward pass of each step also measures the weights that the step before it left (Eq. 11), so monitoring
costs one extra forward per update, not one per step.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from teamtr_min import objective
from teamtr_min.config import Config
from teamtr_min.model import Transformer
from teamtr_min.rollout import AgentBatch

HALVINGS = 10
BETA_LEAST, BETA_MOST = 1e-4, 1.0
GRADIENT_NORM = 1.0
KL_NAMES = ("kl", "kl_k1", "kl_k3", "kl_exact")  # "kl" is the one that the radius is enforced on
REPORT = (
    "entropy", "sampler_mismatch", "sampler_mismatch_max", "grad_norm", "loss", "clip_fraction", "ratio_mean",
    "ratio_max", *(f"{name}_before" for name in KL_NAMES), *(f"{name}_after" for name in KL_NAMES),
    "steps", "halvings", "lr", "beta", "delta", "tokens_trained",
)  # fmt: skip


class Diverged(Exception):
    """A loss, gradient or weight is not finite. The agent is back at its last accepted weights."""


class Point(NamedTuple):
    """Masters and optimizer state at one moment: what an update can go back to."""

    masters: list[Tensor]
    state: list[dict[str, Tensor]]


class Learner:
    """The trainable side of one agent, or of several that step together: fp32 masters, AdamW and beta.

    The model's own parameters are what samples and what is measured. In fp32 they are the masters themselves;
    in bf16 the masters are a second copy, and every change of theirs is rounded into the model at once, so
    that the monitor sees exactly the weights that the sampler will use.
    """

    def __init__(self, models: list[Transformer], beta: float):
        self.models, self.beta = models, beta
        named = [(f"{i}.{name}", p) for i, model in enumerate(models) for name, p in model.named_parameters()]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        single = all(p.dtype == torch.float32 for p in self.parameters)
        self.masters = self.parameters if single else [p.detach().float() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.park("cpu")

    def add_gradients(self) -> None:
        """Move the model's gradients into the masters', which sum them in fp32; call after each backward."""
        if self.masters is not self.parameters:
            for master, p in zip(self.masters, self.parameters):
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    def step(self, lr: float) -> float:
        """One optimizer step on the gradients added up so far; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, GRADIENT_NORM).item()
        if not math.isfinite(norm):
            raise Diverged("the gradient is not finite")
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round()
        return norm

    def park(self, device: torch.device | str) -> None:
        """Move what only updates need, Adam's moments and masters that are a second copy, to `device`."""
        if self.masters is not self.parameters:
            for p in self.masters:
                p.data = p.data.to(device)
        for state in self.optimizer.state.values():
            state |= {name: value.to(device) for name, value in state.items() if name != "step"}

    @torch.no_grad()
    def point(self, into: Point | None = None) -> Point:
        """A copy of where this learner stands; in the memory of `into`, an earlier one, if given."""
        point = into or Point([torch.empty_like(p) for p in self.masters], [{} for _ in self.masters])
        for i, p in enumerate(self.masters):
            point.masters[i].copy_(p)
            point.state[i].clear()
            point.state[i].update({name: value.clone() for name, value in self.optimizer.state[p].items()})
        return point

    @torch.no_grad()
    def go(self, base: Point, toward: list[Tensor] | None = None, fraction: float = 0.0) -> None:
        """Stand at base + fraction * (toward - base), with the optimizer state of `base` and no gradients."""
        for i, p in enumerate(self.masters):
            p.copy_(base.masters[i] if toward is None else base.masters[i].lerp(toward[i], fraction))
            self.optimizer.state[p] = {name: value.clone() for name, value in base.state[i].items()}
        self.optimizer.zero_grad(set_to_none=True)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        if self.masters is not self.parameters:
            for master, p in zip(self.masters, self.parameters):
                p.copy_(master)


def update_agent(learner: Learner, batches: list[AgentBatch], config: Config, lr: float) -> dict:
    """Algorithm 1, inner loop: at most `inner_steps` optimizer steps on one agent, ended by the radius.

    `batches` are the learner's messages in the rollouts that this update trains on. Returns what
    metrics.jsonl records of the update: KL before and after enforcement, beta, norms, counts. Raises
    Diverged, with the last accepted weights in place, when a loss, gradient or weight stops being finite.
    """
    if not batches:  # a router may leave an agent out of every rollout
        return dict.fromkeys(REPORT) | {"steps": 0, "halvings": 0, "tokens_trained": 0}
    learner.park(learner.models[0].device)
    accepted, report = learner.point(), {}
    exact = config.kl_estimator == "exact"
    old_heads = {model: model.head.detach().clone() for model in learner.models if exact}
    # Without any advantage there is nothing to climb: a step would only follow Adam's momentum. [ours]
    steps = config.inner_steps if any(batch.advantage.any() for batch in batches) else 0

    def measure(grad: bool) -> dict[str, float]:
        return evaluate(learner, batches, config, old_heads, grad)

    try:
        for step in range(steps + 1):
            last = step == steps
            here = attempted = measure(grad=not last)
            if step == 0:
                report = {
                    name: here.pop(name) for name in ("entropy", "sampler_mismatch", "sampler_mismatch_max")
                }
            elif here["kl"] > config.radius:
                break
            if last:
                break
            accepted, inside = learner.point(into=accepted) if step else accepted, here
            report["grad_norm"] = learner.step(lr)
        halvings = 0
        if attempted["kl"] > config.radius:
            outside = [p.detach().clone() for p in learner.masters]
            while here["kl"] > config.radius and halvings < HALVINGS:
                halvings += 1
                learner.go(accepted, toward=outside, fraction=0.5**halvings)
                here = measure(grad=False)
            if here["kl"] > config.radius:
                learner.go(accepted)
                here, halvings = inside, HALVINGS + 1
    except (Diverged, KeyboardInterrupt):
        learner.go(accepted)
        raise
    finally:
        learner.park("cpu")  # an agent that waits for its turn leaves the device to the others

    beta = learner.beta
    if steps and config.kl in ("hard", "adaptive"):
        learner.beta = adapt_beta(beta, attempted["kl"], config.delta)
    report.setdefault("grad_norm", None)
    report |= {name: here[name] for name in ("loss", "clip_fraction", "ratio_mean", "ratio_max")}
    report |= {f"{name}_before": attempted[name] for name in KL_NAMES}
    report |= {f"{name}_after": here[name] for name in KL_NAMES}
    report |= {"steps": step, "halvings": halvings, "lr": lr, "beta": beta}
    report["delta"] = config.delta if math.isfinite(config.delta) else None
    report["tokens_trained"] = step * sum(len(batch.targets) for batch in batches)
    return report


def evaluate(
    learner: Learner,
    batches: list[AgentBatch],
    config: Config,
    old_heads: dict[Transformer, Tensor],
    grad: bool,
) -> dict[str, float | None]:
    """Eq. 10 and 11 over all batches; with `grad`, the loss's gradient is added to the masters.

    The first pass of an update fixes pi_old: its own log-probs become `old_logp`, which makes the first ratio
    exactly 1. It also reports entropy and how far the sampler's log-probs are from the trainer's.
    """
    exact = config.kl_estimator == "exact"
    messages = sum(len(batch.advantage) for batch in batches)
    tokens = sum(len(batch.targets) for batch in batches)
    sums, ratio_max, mismatch_max = {}, [], []

    def add(name: str, value: Tensor, share: float) -> None:
        sums[name] = sums.get(name, 0.0) + value.detach() * share

    for batch in batches:
        share = len(batch.advantage) / messages  # Eq. 10 and 11 are means over all of the agent's messages
        model = batch.model
        first = batch.old_logp is None
        with torch.set_grad_enabled(grad):
            hidden = model.hidden(batch.tokens).flatten(0, 1)[batch.where]  # (N, C): trainable positions only
            old = (batch.old_hidden, old_heads[model]) if exact and not first else None
            token = kernels.linear_logprob_stats(
                hidden, model.head, batch.targets, config.temperature, entropy=first, old=old
            )
            if first:
                batch.old_logp = token.logp.detach()
                batch.old_hidden = hidden.detach() if exact else None
                mismatch = (batch.sampled_logp - batch.old_logp).abs()
                add("entropy", token.entropy.sum(), 1 / tokens)
                add("sampler_mismatch", mismatch.sum(), 1 / tokens)
                mismatch_max.append(mismatch.max())
            loss, stats = objective.trust_region_loss(  # Eq. 10
                token.logp,
                batch.old_logp,
                batch.message,
                batch.advantage,
                clip=config.clip,
                beta=learner.beta,
                ratio=config.ratio,
                kl_unit=config.kl_unit,
            )
            if grad:
                (loss * share).backward()
                learner.add_gradients()
        add("loss", loss, share)
        for name in ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean"):
            add(name, stats[name][0], share)
        ratio_max.append(stats["ratio_max"][0])
        if exact:
            kl = torch.zeros_like(token.logp) if first else token.kl  # (N,)
            length = torch.bincount(batch.message)[batch.message] if config.kl_unit == "token" else 1
            add("kl_exact", (kl / length).sum(), 1 / messages)
    sums["ratio_max"] = torch.stack(ratio_max).max()
    if mismatch_max:
        sums["sampler_mismatch_max"] = torch.stack(mismatch_max).max()

    values = dict(zip(sums, torch.stack(list(sums.values())).tolist()))  # the one device sync
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value}")
    values.setdefault("kl_exact", None)
    return {"kl": values[f"kl_{config.kl_estimator}"], **values}


def adapt_beta(beta: float, attempted: float, delta: float) -> float:
    """[ours] Follow the overshoot of the attempted update, within bounds; a beta of 0 stays off."""
    if beta == 0:
        return beta
    if attempted > 1.5 * delta:
        beta *= 1.5
    elif attempted < delta / 1.5:
        beta /= 1.5
    return min(max(beta, BETA_LEAST), BETA_MOST)
