"""What a run tells: lines on the terminal, lines of metrics.jsonl and transcripts.jsonl.

docs/metrics.md explains every key. A line holds only what was measured: a key that means nothing is absent.
"""

import io
import math
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from teamtr_min.config import Config
from teamtr_min.engine.distributed import ALONE, Ranks, join, lost
from teamtr_min.files import UserError, read_jsonl, users_line
from teamtr_min.learner import Diverged, Learner, Update
from teamtr_min.rollout import Rollouts
from teamtr_min.run.memory import size
from teamtr_min.tasks.task import Problem
from teamtr_min.team import Team

COSTS = (  # of an update; the run's are their sums
    "rollouts", "tokens_sampled", "tokens_trained", "seconds_sampling", "seconds_training",
    "rollouts_diagnostics", "tokens_sampled_diagnostics", "seconds_diagnostics",
)  # fmt: skip


def measured(line: dict) -> dict:
    """The line without values that are None, NaN or infinite."""
    return {k: v for k, v in line.items() if v is not None and (type(v) is not float or math.isfinite(v))}


def mean_interval(values: torch.Tensor) -> tuple[float, list[float]]:
    """Mean of values (P,) in [0, 1], one per problem, and its 95% interval: Wilson's score interval.

    For values 0 and 1 it is Wilson's own [Wilson 1927]: inside [0, 1], and 0 right of 16 is not [0, 0].
    Other values (partial credit, means over k rollouts of a problem) vary less than 0 and 1 with the same
    mean do, so they count as more problems: as many as give their standard error, which is estimated, so the
    quantile is Student's, by its expansion in 1 / (P - 1). [ours]
    """
    z, effective, values = 1.96, len(values), values.double()
    mean, variance = values.mean().item(), values.var(correction=0).item()
    binary = mean * (1 - mean)  # the variance of zeros and ones with this mean
    if 1e-12 < variance < binary - 1e-12:
        v = len(values) - 1  # degrees of freedom
        effective = v * binary / variance
        z += (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(binary / effective + (z / (2 * effective)) ** 2)
    return mean, [max(0.0, centre - half), min(1.0, centre + half)]


def totals(updates: list[dict]) -> dict:
    """Costs of updates, and the share whose KL, attempted and kept, exceeded delta; None if none has both."""
    found = {key: sum(u.get(key, 0) for u in updates) for key in COSTS}
    for when in ("before", "after"):
        outside = [u[f"kl_{when}"] > u["delta"] for u in updates if f"kl_{when}" in u and "delta" in u]
        found[f"violation_rate_{when}"] = sum(outside) / len(outside) if outside else None
    return found


def update_line(stage: int, i: int, learner: Learner, rollouts: Rollouts, update: Update) -> dict:
    own, returns, grouped = rollouts.by(learner.agents), rollouts.returns, rollouts.grouped_returns
    no_advantage = grouped.amax(1) == grouped.amin(1)  # (P,) all returns are the same
    stats = update.first | update.kept  # entropy and mismatch were measured at pi_old alone
    kl_after = stats.pop("kl", None)
    return {
        "kind": "update", "stage": stage, "update": i,
        "agent": learner.agents[0] if len(learner.agents) == 1 else None,
        "accuracy": (returns == 1).float().mean().item(), "return_mean": returns.mean().item(),
        "zero_variance_groups": no_advantage.float().mean().item(),
        "ess_weights": None if rollouts.weights is None else rollouts.ess,
        "messages": len(own),
        "message_tokens": sum(len(m.tokens) for m in own) / len(own) if own else None,
        "truncated": sum(not m.stopped for m in own) / len(own) if own else None,
        "kl_before": update.attempted.get("kl"), "kl_after": kl_after, **stats,
        **{name: getattr(update, name) for name in ("steps", "halvings", "grad_norm", "lr", "beta")},
        "rollouts": 0 if rollouts.reused else len(returns), "tokens_sampled": rollouts.tokens_sampled,
        "tokens_trained": update.tokens, "seconds_sampling": rollouts.seconds,
    }  # fmt: skip


def transcripts(rollouts: Rollouts, stage: int, split: str, count: int = 4) -> list[dict]:
    """`count` rollouts, spread evenly over the problems; the 4 of a collection are among its 32."""
    every = list(zip(rollouts.problems, rollouts.messages, rollouts.returns.tolist()))
    count = min(count, len(every))
    some = [every[i * len(every) // count] for i in range(count)]
    return [
        {"id": p.id, "text": p.text, "answer": p.answer, "return": value, "stage": stage, "split": split,
         "messages": [{"agent": m.agent, "text": m.text, "stopped": m.stopped} for m in messages]}
        for p, messages, value in some
    ]  # fmt: skip


def read_log(path: Path) -> list[dict]:
    """The lines of a log. A last line that a kill cut off is left out; UserError names any other damage."""
    return [record for _, record in read_jsonl(path, whole=True)]


def write_scalars(writer, lines: list[dict], names: list[str]) -> None:
    """The numbers in lines of metrics.jsonl, by stage: `kl_after/0 A`, `stage/KEY`, `evaluation/KEY`."""
    for line in (line for line in lines if "stage" in line):
        agent = f"{line['agent']} {names[line['agent']]}" if "agent" in line else "team"
        for key in line.keys() - {"stage", "update", "agent"}:
            if type(line[key]) in (int, float, bool):
                tag = f"{key}/{agent}" if line["kind"] == "update" else f"{line['kind']}/{key}"
                writer.add_scalar(tag, line[key], line["stage"])


def say(text: str) -> None:
    """Print above the bars; nothing for an empty text."""
    if text:
        with tqdm.external_write_mode():
            print(text, flush=True)


def program(work: Callable[[Ranks], None]) -> int:
    """Do `work` in the processes that torchrun has started, or in this one. If it fails, say why in a
    sentence; an error in code, a user's too, also shows its traceback. Returns the exit code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a sign, a pipe hold another code
    ranks, code = ALONE, 0
    try:
        ranks = join()
        work(ranks)
    except KeyboardInterrupt:
        ranks.say("interrupted")
        code = 130
    except (Diverged, FloatingPointError, torch.OutOfMemoryError) as error:
        ranks.say(f"stopped: {str(error).splitlines()[0]}")
        code = 1
    except Exception as error:
        of_user = None if isinstance(error, UserError) else users_line(error)
        known = of_user or lost(ranks, error)
        if of_user or not (known or isinstance(error, UserError | OSError)):
            traceback.print_exc()
        ranks.say(f"error: {known or error}")
        code = 2
    return ranks.leave(code)


def header(config: Config, team: Team, directory: Path) -> str:
    """Team, model, task, method and place, one line each."""
    models = [agent.model for agent in team.agents if agent.model is not None]
    kinds = ", ".join(f"{a.role.name} {a.model.config.family if a.model else 'tool'}" for a in team.agents)
    sizes = {f"{sum(p.numel() for p in model.parameters()):,}": None for model in models}  # in order
    precision = "fp32" if models[0].dtype == torch.float32 else "bf16 over fp32 masters"
    adapters = "".join([f" with adapters of rank {a.adapter.rank}" for a in team.agents if a.adapter][:1])
    return f"""\
team    {len(models)} agents ({kinds}), {" or ".join(sizes)} parameters each
model   {config.model}{adapters}, {precision} on {models[0].device}
task    {config.task}: {team.turns} turns, {config.problems} problems x {config.group} rollouts
method  {occupancy(config)}, {config.order} order, {region(config)}
steps   {config.stages} stages, at most {config.inner_steps} steps an update at lr {config.lr:g}
output  {directory}"""


def prompts_in_use(team: Team, problem: Problem) -> str:
    """What each agent sees before the first message on `problem`, special tokens included."""
    shown = []
    for j, agent in enumerate(team.agents):
        if agent.chat:
            text = agent.tokenizer.decode(team.render(j, problem, [], True).ids, skip_special_tokens=False)
            shown.append(f"prompt  agent {j}, {agent.role.name}:\n" + textwrap.indent(text, " " * 8))
    return "\n".join(shown)


def occupancy(config: Config) -> str:
    """The rollouts that updates train on, in words."""
    floor = f" (min-ess {config.min_ess:g})" if config.occupancy == "corrected" else ""
    return f"{config.occupancy} occupancy{floor}"


def region(config: Config) -> str:
    """The bound on an update, in words."""
    return {
        "hard": f"radius {config.delta:g} ({config.kl_estimator} per {config.kl_unit})",
        "adaptive": f"KL penalty adapted to {config.delta:g}, no radius",
        "fixed": f"KL penalty {config.beta:g}, no radius",
        "none": "no trust region",
    }[config.kl]


def score(accuracy: str, mean_return: str, interval: str = "") -> str:
    """`accuracy 0.250`, or with partial credit `return 0.612 (accuracy 0.250)`."""
    partial = f" (accuracy {accuracy})" if mean_return != accuracy else ""
    return f"{'return' if partial else 'accuracy'} {mean_return}{interval}{partial}"


def held_out_score(results: dict, *names: str) -> str:
    """`accuracy 0.250 [0.221, 0.281]`, or of two evaluations `accuracy 0.020 -> 0.250 [...]`."""
    keys = "accuracy", "return"
    shown = [" -> ".join(f"{results[f'{key}_{name}']:.3f}" for name in names) for key in keys]
    low, high = results[f"return_{names[-1]}_ci"]
    return score(*shown, f" [{low:.3f}, {high:.3f}]")


def stage_text(stage: dict, updates: list[dict], config: Config, names: list[str]) -> str:
    """A stage's line: the team before its first update, and the KL of each agent's update. `B 0.0153*`: the
    star says that the update exceeded its radius and was shortened."""
    kls = []
    for u in sorted(updates, key=lambda u: u.get("agent", 0)):
        kl = f"{u['kl_after']:.4f}{'*' if u['halvings'] else ' '}" if "kl_after" in u else "no turn"
        kls.append(f"{names[u['agent']] if 'agent' in u else 'team'} {kl}")
    text = f"stage {stage['stage'] + 1:3d}/{config.stages}  "
    text += score(f"{stage['accuracy']:.3f}", f"{stage['return_mean']:.3f}")
    if "accuracy_held_out" in stage:
        text += f"  held-out {held_out_score(stage, 'held_out')}"
    text += f"  KL {' '.join(kls)} of {config.delta:g}  {stage['seconds']:4.0f} s"
    if "certificate" in stage:
        text += f"\n      certificate {stage['certificate']:,.0f}{' (vacuous)' if stage['vacuous'] else ''}"
        text += f", bound {stage['bound']:+.3f}, ESS/B {min(u['ess'] for u in updates if 'ess' in u):.2f}"
    return text


def advice(config: Config, updates: list[dict]) -> str:
    """What would help a run in whose first stage no two rollouts of a problem differed; else ""."""
    if any(u["zero_variance_groups"] < 1 for u in updates):
        return ""
    mean = sum(u["return_mean"] for u in updates) / len(updates)
    form = "" if config.warm_start else "--warm-start STEPS, which shows the form of a right answer; "
    helps = f"{form}a --group larger than {config.group}, or a task that gives partial credit"
    helps = f"{helps}: see docs/your-data.md" if mean < 1 else "harder problems"
    return (
        f"nothing to learn from yet: all rollouts of a problem have the same return (on average {mean:.2f}), "
        f"and an update compares them. What helps: {helps}"
    )


def closing(config: Config, directory: Path, summary: dict, stages: list[dict]) -> str:
    """The last lines of a run: the curve, the result, where the files are, what to do next."""
    lines = []
    if stages:
        shown = "mean return" if any(s["return_mean"] > s["accuracy"] for s in stages) else "accuracy"
        some = stages[:: -(-len(stages) // 60)]  # at most 60
        curve = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * stage["return_mean"]))] for stage in some)
        lines.append(f"{shown} by stage, 0 to 1: {curve}")
    if summary["reason"]:
        lines.append(f"stopped early: {summary['stopped']}; to go on: python train.py --resume {directory}")
    else:
        result, n = held_out_score(summary, "start", "final"), summary["problems_held_out"]
        cost = f"{summary['seconds']:.0f} s, {summary['rollouts']:,} rollouts"
        lines.append(f"held-out {result}, {n:,} problems; {cost}")
    if summary["violation_rate_before"] is not None:
        what = "the radius and were shortened" if config.kl == "hard" else f"{config.delta:g} nats of KL"
        lines.append(f"{summary['violation_rate_before']:.0%} of updates exceeded {what}")
    lines.append(f"memory peak {size(summary['memory_peak'])} of {size(summary['memory_planned'])} planned")
    if (directory / "agents").is_dir():
        lines.append(
            f"next: python eval.py {shlex.quote(config.task)} --team {shlex.quote(str(directory))} --k 4"
        )
    return "\n".join(lines)
