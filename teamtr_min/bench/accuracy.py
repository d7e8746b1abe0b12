"""How often a team is right: avg@k and unbiased pass@k over problems it was never trained on.

Every problem gets k rollouts at the team's own temperature. avg@k is the mean return 1 over all of them;
pass@j is the chance that at least one of j rollouts is right, estimated without bias from the k that were
drawn [Chen et al. 2021]: 1 - C(k - c, j) / C(k, j) for c right ones. Intervals are 95% bootstrap percentiles
over problems.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from teamtr_min import rng
from teamtr_min.config import SHIPPED, Config, UserError
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.tasks import load_task, read_problems
from teamtr_min.team import Team, load_team

RESAMPLES = 2000


@dataclass(frozen=True)
class Subject:
    """The team to evaluate: a run's agents, or fresh copies of a model."""

    name: str
    config: Config
    sources: list[Path] | None  # the run's agents


def find_subject(team: str | None, changes: dict, task: str = "relay") -> Subject:
    """The run `team`; without one the newest run here; without any, the shipped team.

    `changes` are Config fields from the command line; naming a model or a team size asks for an untrained
    team, of the model that comes with `task` if none is named.
    """
    fresh = {"model", "agents"} & set(changes)
    if team and fresh:
        raise UserError(
            "--team is a trained team with its own agents and models; leave out --agents and --model"
        )
    if not team and not fresh:
        runs = [p.parent for p in Path("runs").glob("*/summary.json") if (p.parent / "agents").is_dir()]
        team = str(max(runs, key=lambda run: (run / "summary.json").stat().st_mtime, default=""))
    if not team:
        return Subject("untrained team", Config.of({"task": task} | changes), None)
    directory = Path(team)
    config = Config.load(directory / "config.json", changes)
    sources = [directory / "agents" / str(j) for j in range(config.agents)]
    if not all(source.is_dir() for source in sources):
        raise UserError(f"{directory} holds no trained agents (agents/0 to agents/{config.agents - 1})")
    return Subject(str(directory), config, sources)


def run(
    subject: Subject, task_name: str, *, k: int, count: int, data: str | None
) -> tuple[dict, Rollouts, Team]:
    """Evaluate; returns what `--json` prints, the rollouts and the team."""
    own_data = subject.config.data if subject.config.task == task_name else ""
    task_data = "" if task_name in SHIPPED else data or own_data
    config = dataclasses.replace(subject.config, task=task_name, data=task_data)
    task = load_task(config)
    if data and hasattr(task, "fields") and not Path(data).is_dir():
        problems = read_problems(data, *task.fields)  # all of a file that was named for this
    else:
        problems = task.draw(count, rng.generator(0, "held-out"), held_out=True)
    team = load_team(config, task.roles(config.agents), subject.sources)
    rollouts = collect(team, problems, k, task.grade, config, ("eval",))
    right = (rollouts.grouped_returns == 1).sum(1)  # (P,)
    result = {
        "benchmark": task_name,
        "team": subject.name,
        "mode": "team",
        "agents": config.agents,
        "k": k,
        "problems": len(problems),
        "temperature": config.temperature,
        "seed": config.seed,
        "data": data,
        "tokens_sampled": rollouts.tokens_sampled,
        "seconds": rollouts.seconds,
    }
    for name, values in {"avg_at_k": right / k, "pass_at_k": pass_at(right, k, k)}.items():
        result[name], result[f"{name}_ci"] = mean_with_interval(values.numpy(), config.seed)
    return result, rollouts, team


def pass_at(right: Tensor, drawn: int, j: int) -> Tensor:
    """Unbiased chance that one of j rollouts is right, from the `right` (P,) ones among `drawn`."""
    total = math.comb(drawn, j)
    return right.new_tensor([1 - math.comb(drawn - c, j) / total for c in right.tolist()], dtype=float)


def mean_with_interval(
    values: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[float, list[float]]:
    """Mean of per-problem values and its 95% bootstrap interval over problems."""
    generator = rng.generator(seed, "bootstrap")
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return float(values.mean()), [float(q) for q in np.quantile(means, (0.025, 0.975))]


def table(result: dict, right: Tensor) -> str:
    """The result in words: avg@k, and pass@j for j = 1, 2, 4, ... up to k."""
    k, seed = result["k"], result["seed"]
    lines = [
        f"{result['benchmark']}: {result['team']}, {result['agents']} agents, "
        f"{result['problems']:,} problems x {k}, T = {result['temperature']:g}, {result['seconds']:.1f} s"
    ]
    rows = [(f"avg@{k}", right / k)]
    rows += [(f"pass@{j}", pass_at(right, k, j)) for j in sorted({2**i for i in range(k.bit_length())} | {k})]
    for name, values in rows:
        mean, (low, high) = mean_with_interval(values.double().numpy(), seed)
        lines.append(f"  {name:8s} {mean:.3f}  [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def show(rollouts: Rollouts, team: Team, count: int) -> str:
    """The first `count` transcripts, one message a line."""
    lines = []
    for r in range(0, len(rollouts.messages), rollouts.group_size)[:count]:
        problem, verdict = rollouts.problems[r], "right" if rollouts.returns[r] == 1 else "wrong"
        lines.append(f"\n{problem.text}   (answer {problem.answer}; {verdict})")
        lines += [f"  {team.agents[m.agent].role.name}: {m.text}" for m in rollouts.messages[r]]
    return "\n".join(lines)
