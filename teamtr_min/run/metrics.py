"""The lines of metrics.jsonl and transcripts.jsonl; docs/metrics.md explains each key.

A line holds only what was measured: a key that means nothing for it is absent.
"""

import math

from teamtr_min.learner import Update
from teamtr_min.rollout import Rollouts
from teamtr_min.theory.certificate import mean_with_interval

TRANSCRIPTS_PER_COLLECTION = 4
KL_NAMES = ("kl", "kl_k1", "kl_k3", "kl_exact")  # "kl" is the one that the radius is enforced on
COSTS = (  # of an update, which add up to the run's
    "rollouts", "tokens_sampled", "tokens_trained", "seconds_sampling", "seconds_training",
    "rollouts_diagnostics", "tokens_sampled_diagnostics", "seconds_diagnostics",
)  # fmt: skip


def update_line(
    stage: int, i: int, agents: list[int], rollouts: Rollouts, update: Update, delta: float, more: dict
) -> dict:
    """Update number i of a stage; `more` is what the task and the diagnostics measured."""
    own = rollouts.by(agents)
    return measured({
        "kind": "update",
        "stage": stage,
        "update": i,
        "agent": agents[0] if len(agents) == 1 else None,
        "accuracy": rollouts.accuracy,
        "return_mean": rollouts.returns.mean().item(),
        "zero_variance_groups": rollouts.zero_variance_groups,
        "messages": len(own),
        "message_tokens": sum(len(m.tokens) for m in own) / len(own) if own else None,
        "truncated": sum(not m.stopped for m in own) / len(own) if own else None,
        **{name: update.first.get(name) for name in ("entropy", "sampler_mismatch", "sampler_mismatch_max")},
        "grad_norm": update.grad_norm,
        **{name: update.kept.get(name) for name in ("loss", "clip_fraction", "ratio_mean", "ratio_max")},
        **{f"{name}_before": update.attempted.get(name) for name in KL_NAMES},
        **{f"{name}_after": update.kept.get(name) for name in KL_NAMES},
        "steps": update.steps,
        "halvings": update.halvings,
        "lr": update.lr,
        "beta": update.beta,
        "delta": delta if math.isfinite(delta) else None,
        "tokens_trained": update.tokens,
        "rollouts": rollouts.count_sampled,
        "tokens_sampled": rollouts.tokens_sampled,
        "seconds_sampling": rollouts.seconds,
        **more,
    })  # fmt: skip


def stage_line(stage: int, updates: list[dict], **more) -> dict:
    """A stage, from the lines of its updates by agent; `more` is what the run as a whole has measured."""
    first = next(u for u in updates if u["update"] == 0)
    return measured({
        "kind": "stage",
        "stage": stage,
        "accuracy": first["accuracy"],
        "return_mean": first["return_mean"],
        "kl": [u["kl_after"] for u in updates if "kl_after" in u],
        "delta": first.get("delta"),
        **more,
    })  # fmt: skip


def swap_shock(name: str, before: Rollouts, after: Rollouts, seed: int) -> dict:
    """The accuracy that a replacement costs, paired over problems; `name` says when `after` was collected."""
    right = [(rollouts.returns == 1).double() for rollouts in (before, after)]
    shock, interval = mean_with_interval(right[0] - right[1], seed)
    return {f"accuracy_{name}": after.accuracy, f"shock_{name}": shock, f"shock_{name}_ci": interval}


def cost_of(collections: list[Rollouts], purpose: str) -> dict:
    return {
        f"rollouts_{purpose}": sum(rollouts.count_sampled for rollouts in collections),
        f"tokens_sampled_{purpose}": sum(rollouts.tokens_sampled for rollouts in collections),
    }


def measured(line: dict) -> dict:
    return {key: value for key, value in line.items() if value is not None}


def transcripts(rollouts: Rollouts, stage: int, split: str) -> list[dict]:
    """A few rollouts, spread over the problems."""
    stride = max(1, len(rollouts.messages) // TRANSCRIPTS_PER_COLLECTION)
    few = list(zip(rollouts.problems, rollouts.messages, rollouts.returns.tolist()))[::stride]
    return [
        {
            "id": problem.id,
            "text": problem.text,
            "answer": problem.answer,
            "messages": [{"agent": m.agent, "text": m.text} for m in messages],
            "return": value,
            "stage": stage,
            "split": split,
        }
        for problem, messages, value in few[:TRANSCRIPTS_PER_COLLECTION]
    ]


def totals(updates: list[dict]) -> dict:
    return {key: sum(u.get(key, 0) for u in updates) for key in COSTS}


def violation_rate(updates: list[dict], kl: str) -> float | None:
    """Share of updates whose KL exceeded delta; without either they do not count. None without any."""
    outside = [u[kl] > u["delta"] for u in updates if kl in u and "delta" in u]
    return sum(outside) / len(outside) if outside else None
