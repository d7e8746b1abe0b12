"""The lines of metrics.jsonl and transcripts.jsonl; docs/metrics.md explains each key.

A line holds only what was measured: a key that means nothing for it is absent.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from teamtr_min.extras.certificate import mean_with_interval
from teamtr_min.files import UserError, plain_file
from teamtr_min.learner import Update
from teamtr_min.rollout import Rollouts

TRANSCRIPTS_PER_COLLECTION = 4
KL_NAMES = ("kl", "kl_k1", "kl_k3")  # "kl" is the one that the radius is enforced on
COSTS = (  # of an update, which add up to the run's
    "rollouts", "tokens_sampled", "tokens_trained", "seconds_sampling", "seconds_training",
    "rollouts_diagnostics", "tokens_sampled_diagnostics", "seconds_diagnostics",
)  # fmt: skip


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_text(value) -> bool:
    return isinstance(value, str)


def _are_messages(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and _is_count(m.get("agent")) and _is_text(m.get("text")) for m in value
    )


# What is read back, and how: by the kind of line the keys that each has, and below those that it may have.
LINES = {
    "update": dict.fromkeys(("stage", "update", "halvings", "rollouts", "tokens_sampled", "tokens_trained"),
                            _is_count)
    | dict.fromkeys(("accuracy", "return_mean", "zero_variance_groups", "seconds_sampling",
                     "seconds_training"), _is_number),
    "stage": {"stage": _is_count, "accuracy": _is_number, "seconds": _is_number},
    "warm_start": {"step": _is_count},
    "replace": {"stage": _is_count, "agent": _is_count, "model": _is_text},
}  # fmt: skip
TRANSCRIPTS = {
    None: {"text": _is_text, "answer": _is_text, "messages": _are_messages, "return": _is_number,
           "stage": _is_count, "split": _is_text},
}  # fmt: skip
MEASURED = {"accuracy_held_out", "delta", "kl_before", "kl_after", "seconds_evaluation", *COSTS}


def read_lines(path: Path, kinds: dict, damaged: list[str] | None = None) -> list[dict]:
    """The objects of a log, whose kinds are those of LINES or TRANSCRIPTS; UserError names file and line.

    With `damaged` a last line that a kill cut off is left out, and the file noted there.
    """
    try:
        # Not splitlines(): a text may hold other line separators.
        lines = plain_file(path).read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; there is nothing to read yet") from None
    records = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            record = json.loads(line, parse_constant=lambda name: None)  # NaN is a value not measured
            keys: dict[str, Callable] = kinds[record.get("kind") if None not in kinds else None]
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # no JSON, no such kind
            if damaged is not None and number == len(lines):
                damaged.append(path.name)
                break
            raise UserError(f"{path}, line {number}: not a line that a run writes") from None
        if missing := keys.keys() - record.keys():
            raise UserError(f"{path}, line {number}: no {', '.join(sorted(missing))}")
        wrong = [key for key, right in keys.items() if not right(record[key])]
        wrong += [key for key in MEASURED & record.keys() - keys.keys()
                  if not (record[key] is None or _is_number(record[key]))]  # fmt: skip
        if wrong:
            raise UserError(f"{path}, line {number}: {', '.join(sorted(wrong))} cannot be that")
        records.append(record)
    return records


def update_line(
    stage: int, i: int, agents: list[int], rollouts: Rollouts, update: Update, delta: float, more: dict
) -> dict:
    """Update number i of a stage; `more` is what the task and the diagnostics measured."""
    own = rollouts.by(agents)
    line = {
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
    }  # fmt: skip
    if taken := line.keys() & more.keys():
        raise UserError(f"`measure` of the task returns {', '.join(sorted(taken))}, which are logged already")
    return measured(line | more)


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
