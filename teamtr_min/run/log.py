"""What a run tells: lines on the terminal, lines of metrics.jsonl and transcripts.jsonl.

docs/metrics.md explains every key. A line holds only what was measured: a key that means nothing is absent.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.learner import Learner, Update
from teamtr_min.rollout import Rollouts
from teamtr_min.run.memory import size
from teamtr_min.team import Team

TRANSCRIPTS_PER_COLLECTION = 4
COSTS = (  # of an update; the run's are their sums
    "rollouts", "tokens_sampled", "tokens_trained", "seconds_sampling", "seconds_training",
    "rollouts_diagnostics", "tokens_sampled_diagnostics", "seconds_diagnostics",
)  # fmt: skip


RESULTS = [f"{key}_{name}{ci}" for name in ("untrained", "start", "final")
           for key in ("accuracy", "return") for ci in ("", "_ci")]  # fmt: skip


def measured(line: dict) -> dict:
    """The line without values that are None, NaN or infinite."""
    return {k: v for k, v in line.items() if v is not None and (type(v) is not float or math.isfinite(v))}


def mean_interval(values: Tensor) -> tuple[float, list[float]]:
    """Mean of values (P,) in [0, 1], one per problem, and its 95% interval: Wilson's score interval.

    For values 0 and 1 it is Wilson's own [Wilson 1927]. Other values (partial credit, means over k rollouts
    of a problem) vary less than 0 and 1 with the same mean do, so they count as more problems: as many as
    give their standard error. [ours] The interval never leaves [0, 1], and 0 right of 16 is not [0, 0].
    """
    n, z, values = len(values), 1.96, values.double()
    mean, variance = values.mean().item(), values.var(correction=0).item()
    binary = mean * (1 - mean)  # the variance of zeros and ones with this mean
    effective = n * binary / variance if variance > 1e-12 else n
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(binary / effective + (z / (2 * effective)) ** 2)
    return mean, [max(0.0, centre - half), min(1.0, centre + half)]


def held_out_results(returns: Tensor, name: str) -> dict:
    """`accuracy_NAME` and `return_NAME` of one rollout per held-out problem (P,), with their intervals."""
    found = {}
    for key, values in (("accuracy", (returns == 1).double()), ("return", returns)):
        found[f"{key}_{name}"], found[f"{key}_{name}_ci"] = mean_interval(values)
    return found


def violation_rate(updates: list[dict], kl: str) -> float | None:
    """Share of updates whose KL exceeded delta. Those without either do not count; None if none does."""
    outside = [u[kl] > u["delta"] for u in updates if kl in u and "delta" in u]
    return sum(outside) / len(outside) if outside else None


def totals(updates: list[dict]) -> dict:
    return {key: sum(u.get(key, 0) for u in updates) for key in COSTS}


def update_line(stage: int, i: int, learner: Learner, rollouts: Rollouts, update: Update) -> dict:
    """Update number i of a stage."""
    own = rollouts.by(learner.agents)
    return {
        "kind": "update",
        "stage": stage,
        "update": i,
        "agent": learner.agents[0] if len(learner.agents) == 1 else None,
        "accuracy": rollouts.accuracy,
        "return_mean": rollouts.returns.mean().item(),
        "zero_variance_groups": rollouts.zero_variance_groups,
        "ess_weights": None if rollouts.weights is None else rollouts.ess,
        "messages": len(own),
        "message_tokens": sum(len(m.tokens) for m in own) / len(own) if own else None,
        "truncated": sum(not m.stopped for m in own) / len(own) if own else None,
        **{name: update.first.get(name) for name in ("entropy", "sampler_mismatch", "sampler_mismatch_max")},
        **{name: update.kept.get(name) for name in ("loss", "clip_fraction", "ratio_mean", "ratio_max")},
        "kl_before": update.attempted.get("kl"),
        **{f"{name}_after": update.kept.get(name) for name in ("kl", "kl_k1", "kl_k3")},
        **{name: value for name, value in update.kept.items() if name.startswith("kl_agent_")},
        "steps": update.steps,
        "halvings": update.halvings,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "beta": update.beta,
        "rollouts": rollouts.count_sampled,
        "tokens_sampled": rollouts.tokens_sampled,
        "tokens_trained": update.tokens,
        "seconds_sampling": rollouts.seconds,
    }  # fmt: skip


def stage_line(stage: int, updates: list[dict]) -> dict:
    """A stage, from the lines of its updates in their order: the team is the one that began the stage."""
    first, by_agent = updates[0], sorted(updates, key=lambda u: u.get("agent", 0))
    return {
        "kind": "stage",
        "stage": stage,
        "accuracy": first["accuracy"],
        "return_mean": first["return_mean"],
        "kl": [u["kl_after"] for u in by_agent if "kl_after" in u],
        "delta": first.get("delta"),
    }


def transcripts(rollouts: Rollouts, stage: int, split: str) -> list[dict]:
    """A few rollouts, spread over the problems."""
    stride = max(1, len(rollouts.messages) // TRANSCRIPTS_PER_COLLECTION)
    few = list(zip(rollouts.problems, rollouts.messages, rollouts.returns.tolist()))[::stride]
    return [
        {"id": p.id, "text": p.text, "answer": p.answer,
         "messages": [{"agent": m.agent, "text": m.text} for m in messages],
         "return": value, "stage": stage, "split": split}
        for p, messages, value in few[:TRANSCRIPTS_PER_COLLECTION]
    ]  # fmt: skip


def read_log(path: Path) -> list[dict]:
    """The lines of a log. A last line that a kill cut off is left out; UserError names any other damage."""
    try:
        *lines, last = path.read_bytes().split(b"\n")  # a whole line ends with a newline
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return records


def say(text: str) -> None:
    """Print above the bars; nothing for an empty text."""
    if text:
        with tqdm.external_write_mode():
            print(text, flush=True)


def header(config: Config, team: Team, directory: Path) -> str:
    """Team, model, task, method and place, one line each."""
    models = [agent.model for agent in team.agents if agent.model is not None]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    trained = max(sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models)
    each = ", ".join(f"{a.role.name} {a.model.config.family if a.model else 'tool'}" for a in team.agents)
    parameters = f"{sizes[0]:,} parameters each"
    if len(set(sizes)) > 1:
        parameters = " + ".join(f"{size:,}" for size in sizes) + " parameters"
    if config.lora_rank:
        parameters += f", {trained:,} of them trained"
    precision = "fp32" if models[0].dtype == torch.float32 else "bf16 over fp32 masters"
    scaled = f" times {config.lr_scale}" if config.lr_scale else ""
    return (
        f"team    {len(team.agents)} agents ({each}), {parameters}, {precision} on {models[0].device}\n"
        f"model   {config.model}\n"
        f"task    {config.task}: {team.turns} turns, temperature {config.temperature:g}, "
        f"{config.problems} problems x {config.group} rollouts\n"
        f"method  {config.occupancy} occupancy, {config.order} order, {region(config)}, "
        f"at most {config.inner_steps} steps at lr {config.lr:g}{scaled}, {config.stages} stages\n"
        f"output  {directory}"
    )


def region(config: Config) -> str:
    """The bound on an update, in words."""
    return {
        "hard": f"radius {config.delta:g} ({config.kl_estimator} per {config.kl_unit})",
        "adaptive": f"KL penalty adapted to {config.delta:g}, no radius",
        "fixed": f"KL penalty {config.beta:g}, no radius",
        "none": "no trust region",
    }[config.kl]


def score(accuracy: float, mean_return: float) -> str:
    """`accuracy 0.250`, or with partial credit `return 0.612 (accuracy 0.250)`.

    Returns lie in [0, 1], so their mean exceeds the accuracy exactly where some are neither 0 nor 1.
    """
    if mean_return > accuracy:
        return f"return {mean_return:.3f} (accuracy {accuracy:.3f})"
    return f"accuracy {accuracy:.3f}"


def held_out_score(results: dict, name: str, since: str = "") -> str:
    """`accuracy 0.250 [0.221, 0.281]`, or since another evaluation `accuracy 0.020 -> 0.250 [...]`."""
    names = [since, name] if since else [name]
    accuracy, mean_return = (" -> ".join(f"{results[f'{key}_{n}']:.3f}" for n in names)
                             for key in ("accuracy", "return"))  # fmt: skip
    if mean_return == accuracy:
        low, high = results[f"accuracy_{name}_ci"]
        return f"accuracy {accuracy} [{low:.3f}, {high:.3f}]"
    low, high = results[f"return_{name}_ci"]
    return f"return {mean_return} [{low:.3f}, {high:.3f}] (accuracy {accuracy})"


def stage_text(stage: dict, updates: list[dict], config: Config, names: list[str]) -> str:
    """A stage's line: the team before its first update, and the KL of each agent's update.

    `B 0.0153*`: the star says that the update exceeded its radius and was taken back a part of the way.
    """
    kls = []
    for u in sorted(updates, key=lambda u: u.get("agent", 0)):
        star = "*" if u["halvings"] else " "
        kl = f"{u['kl_after']:.4f}{star}" if "kl_after" in u else "no turn"
        kls.append(f"{names[u['agent']] if 'agent' in u else 'team'} {kl}")
    scores = score(stage["accuracy"], stage["return_mean"])
    if "accuracy_held_out" in stage:
        scores += f"  held-out {held_out_score(stage, 'held_out')}"
    text = (
        f"stage {stage['stage'] + 1:3d}/{config.stages}  {scores}"
        f"  KL {' '.join(kls)} of {config.delta:g}  {stage['seconds']:4.0f} s"
    )
    if "certificate" in stage:
        vacuous = " (vacuous)" if stage["vacuous"] else ""
        text += f"\n      certificate {stage['certificate']:,.0f}{vacuous}, bound {stage['bound']:+.3f}"
        text += f", stale gap {stage.get('delta_stale', 0):.4f}"
        shifts, shares = zip(*((u["occupancy_shift"], u["ess"]) for u in updates if "ess" in u))
        text += f", occupancy shift {max(shifts):.3f}, ESS/B {min(shares):.2f}"
    return text


def nothing_to_learn(config: Config, updates: list[dict]) -> str:
    """Advice where all groups of the first collections have equal returns; "" where one has not."""
    if any(u["zero_variance_groups"] < 1 for u in updates):
        return ""
    mean = sum(u["return_mean"] for u in updates) / len(updates)
    helps = f"a --group larger than {config.group}, or a task that gives partial credit"
    if not config.warm_start:
        helps = f"--warm-start STEPS, which shows the form of a right answer; {helps}"
    return (
        f"nothing to learn from yet: the {config.group} rollouts of each problem all have the same return "
        f"(on average {mean:.2f}), and an update compares those of one problem. What helps: "
        + ("harder problems" if mean == 1 else helps)
    )


def hardly_moving(config: Config, updates: list[dict], names: list[str]) -> str:
    """Advice after the first stage where whole updates used far less than the radius; else ""."""
    slow = []
    for u in updates:
        whole = u["steps"] and not u["halvings"] and u["lr"] and "agent" in u
        if whole and abs(u["kl_after"]) < config.delta / 1000 < math.inf:
            slow.append(names[u["agent"]])
    if not slow:
        return ""
    return (
        f"{' and '.join(slow)} hardly moved: less than a thousandth of the radius of {config.delta:g} nats. "
        "A higher --lr, or --lr-scale for these agents, would use it: KL grows as the square of the rate"
    )


def closing(config: Config, directory: Path, summary: dict, stages: list[dict]) -> str:
    """The last lines of a run: the curve, the result, where the files are, what to do next."""
    lines = [""]
    if stages:
        partial = any(s["return_mean"] > s["accuracy"] for s in stages)
        label = f"{'mean return' if partial else 'accuracy'} on each stage's problems, {len(stages)} stages"
        lines.append(plot([s["return_mean"] for s in stages], label=label))
    if summary["reason"]:
        lines.append(f"stopped early: {summary['stopped']}; to go on: python train.py --resume {directory}")
    else:
        lines.append(
            f"held-out {held_out_score(summary, 'final', since='start')}, "
            f"{summary['problems_held_out']:,} problems; {summary['seconds']:.0f} s, "
            f"{summary['rollouts']:,} rollouts"
        )
        if summary["violation_rate_before"] is not None:
            taken_back = " and were taken back" if config.kl == "hard" else ""
            lines.append(f"{summary['violation_rate_before']:.0%} of updates exceeded the radius{taken_back}")
    if summary["memory_peak"]:
        lines.append(
            f"memory peak {size(summary['memory_peak'])} of {size(summary['memory_planned'])} planned"
        )
    if (directory / "agents").is_dir():
        lines.append(f"next: python eval.py {config.task} --team {directory} --k 4")
    return "\n".join(lines)


def plot(values: list[float], height: int = 8, width: int = 60, label: str = "") -> str:
    """A curve in [0, 1] for a terminal; a column is the mean of its share of the values."""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    repeat = max(1, width // columns)
    lines = []
    for row in reversed(range(height)):
        bars = (" ▁▂▃▄▅▆▇█"[max(0, min(8, round(8 * (mean * height - row))))] * repeat for mean in means)
        tick = f"{(row + 1) / height:4.1f}" if (row + 1) % (height // 2) == 0 else "    "
        lines.append(f"{tick} │{''.join(bars)}")
    lines.append(" 0.0 └" + "─" * (columns * repeat) + f" {label}")
    return "\n".join(lines)
