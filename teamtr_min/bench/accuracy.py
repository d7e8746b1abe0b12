"""How often a team is right, or what its mean return is, on problems that it was never trained on.

Every problem gets k rollouts at the team's own temperature. avg@k is the share of all rollouts with a return
of 1. pass@j is the chance that the best of j rollouts has, estimated without bias from the k that were drawn.
Where a task gives partial credit, mean return and expected best return are shown, and accuracy beside them.
All intervals are 95%, over problems.

    team       all rollouts of the team count
    vote       the answer that most of k rollouts give
    best_of    of k rollouts the one that the team itself finds likeliest, per token
    solo       the first agent takes every turn; compared with the team on the same problems at equal tokens
"""

import collections
import dataclasses
import functools
import gc
import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.extras.diagnostics import bootstrap
from teamtr_min.files import UserError
from teamtr_min.hf.weights import pinned
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run.loading import build_team
from teamtr_min.run.log import mean_interval
from teamtr_min.run.memory import peak, plan_evaluation
from teamtr_min.run.run import newest_run
from teamtr_min.tasks import TASKS, Problem, load_task, read_problems
from teamtr_min.tasks.generated import Generated
from teamtr_min.tasks.task import Message, Task
from teamtr_min.team import Team, round_robin

HELD_OUT = 2048  # problems, unless a count is asked for
MODES = ("team", "solo", "best_of", "vote")


class Exam(NamedTuple):
    """A team to evaluate; and once it is prepared, a task and the problems of it that are put to the team."""

    team: str  # directory of the run
    config: Config  # of the team; it names the task
    sources: list[Path] | None = None  # agents/0..n-1 of the run; None: the models of `config`
    task: Task | None = None
    problems: list[Problem] = []


def find_team(team: str | None, flags: dict, task: str | None = None) -> Exam:
    """The run `team`; without one the newest run of `task`; without any, copies of the model of `task`.

    `flags` are fields of Config from the command line. --model or --agents ask for an untrained team. Raises
    UserError for a directory that is no run, or that holds no agents.
    """

    def taken(run: Path) -> bool:
        try:
            return (run / "agents").is_dir() and task in (None, Config.load(run / "config.json").task)
        except UserError:  # no run
            return False

    untrained = sorted({"model", "agents"} & flags.keys())
    if team and untrained:
        raise UserError(f"--team names trained agents with their models: leave out --{untrained[0]}")
    if not team and not untrained:
        team = newest_run("summary.json", taken)
    if not team:
        return Exam("untrained team", pinned(Config(**{"task": task, **flags})))
    run = Path(team)
    config = Config.load(run / "config.json", **{"batch_rows": 0, **flags})  # 0: as many as fit here
    if not (run / "agents").is_dir():
        raise UserError(f"{run} holds no trained agents yet")
    return Exam(str(run), config, [run / "agents" / str(j) for j in range(config.agents)])


def prepare(exam: Exam, name: str | None, count: int | None, data: str | None) -> Exam:
    """The task `name`, or the team's own: `count` problems, or all, of `data`; without it held-out ones."""
    name = name or exam.config.task
    own = exam.config.data if exam.config.task == name else ""
    generated = issubclass(TASKS.get(name, object), Generated)  # such a task reads no data for itself
    config = dataclasses.replace(exam.config, task=name, data="" if generated else data or own)
    task = load_task(config)
    if data and hasattr(task, "fields") and not Path(data).is_dir():
        problems = read_problems(data, *task.fields)[:count]
    else:
        problems = task.sample_problems(count or HELD_OUT, rng.generator(0, "held-out"), held_out=True)
    return exam._replace(config=config, task=task, problems=problems)


def evaluate(exam: Exam, mode: str, k: int, ranks: Ranks = ALONE) -> tuple[dict, dict[str, Rollouts]]:
    """What `--json` prints, and the rollouts behind it by who wrote them: "team", "solo"."""
    begin, config, task, drawn = time.perf_counter(), exam.config, exam.task, {}
    votes, all_problems = callable(getattr(task, "answer", None)), getattr(task, "all_problems", list)
    if not votes and (mode == "vote" or mode == "solo" and k > 1):
        raise UserError("to vote, a task needs a method answer(messages) -> str | None")
    gc.collect()  # the memory of the team before
    sources = exam.sources or config.model_of_each
    before = {problem.id for problem in all_problems()}
    config, plan = plan_evaluation(config, task, exam.problems, k, sources, ranks=ranks)
    long = before - {problem.id for problem in all_problems()}  # with --drop-long
    problems = [problem for problem in exam.problems if problem.id not in long]
    team = build_team(config, task, ranks, sources)

    def sample(team: Team, k: int) -> Rollouts:
        label = f"evaluating {Path(config.task).stem}"
        return collect(team, problems, k, rng.RngPath(config.seed, "eval"), label)

    result = {"benchmark": config.task, "mode": mode, "k": k, **setting(exam, team)}
    drawn["team"] = sample(team, k)
    if mode == "solo":
        alone = dataclasses.replace(team, agents=team.agents[:1], rounds=team.turns, router=round_robin)
        drawn["solo"] = sample(alone, k)
        most = max(rollouts.tokens_sampled for rollouts in drawn.values())
        for who, its in (("team", team), ("solo", alone)):  # who writes less gets as many more rollouts
            more = k * most // max(drawn[who].tokens_sampled, 1)
            if more > k and votes:
                drawn[who] = sample(its, more)
        result["equal_tokens"] = at_equal_tokens(drawn["team"], drawn["solo"], task)
    result |= scores([*drawn.values()][-1], mode, k, task)
    result |= {"memory_peak": peak(plan.device), "memory_planned": plan.total}
    return result | {"problems": len(problems), "seconds": time.perf_counter() - begin}, drawn


def setting(exam: Exam, team: Team) -> dict:
    """What a result rests on besides weights."""
    roles = [agent.role for agent in team.agents]
    prompts = "\0".join(text for role in roles for text in (role.name, role.system))
    names = ("model", "agents", "router", "rounds", "max_new_tokens", "temperature", "seed", "data")
    return {
        "team": exam.team,
        **{name: getattr(exam.config, name) for name in names},
        "roles": [role.name for role in roles],
        "prompts": f"{hashlib.sha256(prompts.encode()).hexdigest()[:8]} of {exam.config.roles or 'the task'}",
        "grader": getattr(exam.task, "grader", "the task's own"),
        "fingerprint": exam.task.fingerprint(),
    }


# Statistics


def best_of(values: Tensor, j: int) -> Tensor:
    """(P,) expected largest of j values, without bias from the k of each problem (P, k).

    Of zeros and ones it is pass@j: 1 - C(k - c, j) / C(k, j) for c ones [Chen et al. 2021].
    """
    k = values.shape[1]
    # The i-th smallest is the largest of C(i, j - 1) choices of j.
    chances = torch.tensor([math.comb(i, j - 1) / math.comb(k, j) for i in range(k)], dtype=torch.float64)
    return values.double().sort(1).values @ chances


def scores(rollouts: Rollouts, mode: str, k: int, task: Task) -> dict:
    """Accuracy and return of what `mode` chooses, pass@j and best return of j rollouts, with intervals."""
    returns = rollouts.grouped_returns  # (P, k), or more at equal tokens
    right, drawn = (returns == 1).double(), rollouts.group_size
    chosen = pick(rollouts, mode, task) if mode in ("vote", "best_of") else returns  # (P, 1) or (P, k)
    each = {"avg_at_k": (chosen == 1).double().mean(1), "return_at_k": chosen.double().mean(1)}
    each["pass_at_k"] = best_of(right, k)
    found = {"rollouts_per_problem": drawn, "partial": bool(((returns != 0) & (returns != 1)).any())}
    for name, values in each.items():
        found[name], found[f"{name}_ci"] = mean_interval(values)
    for name, values in (("pass_at", right), ("best_at", returns)):
        js = sorted({2**i for i in range(drawn.bit_length())} | {drawn})
        means = {str(j): mean_interval(best_of(values, j)) for j in js}
        found[name] = {j: mean for j, (mean, _) in means.items()}
        found[f"{name}_ci"] = {j: interval for j, (_, interval) in means.items()}
    return found | {"tokens_sampled": rollouts.tokens_sampled}


def pick(rollouts: Rollouts, mode: str, task: Task) -> Tensor:
    """(P, 1) return of the rollout that `mode` chooses for each problem; no choice looks at returns."""
    choose = likeliest if mode == "best_of" else functools.partial(voted, task)
    k, messages = rollouts.group_size, rollouts.messages
    chosen = [choose(messages[first : first + k]) for first in range(0, len(messages), k)]
    return rollouts.grouped_returns.gather(1, torch.tensor(chosen)[:, None])


def voted(task: Task, group: list[list[Message]]) -> int:
    """The first rollout with the answer that most give; rollouts without an answer do not vote."""
    answers = [task.answer(messages) for messages in group]
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else 0


def likeliest(group: list[list[Message]]) -> int:
    """The rollout with the largest mean log-prob of a token, under the agents that wrote it."""
    logprobs = [[value for message in messages for value in message.logprobs] for messages in group]
    means = [sum(values) / max(len(values), 1) for values in logprobs]
    return means.index(max(means))


def at_equal_tokens(team: Rollouts, solo: Rollouts, task: Task) -> dict:
    """Team and soloist on the same problems for equal tokens; each votes where it has several rollouts."""
    both = [pick(r, "vote", task) if r.group_size > 1 else r.grouped_returns for r in (team, solo)]  # (P, 1)
    difference, interval = bootstrap(torch.mean, (both[0] - both[1])[:, 0], group=1, seed=0)
    return {
        "team": both[0].mean().item(), "solo": both[1].mean().item(),
        "difference": difference, "difference_ci": interval,
        "rollouts_per_problem": [team.group_size, solo.group_size],
        "tokens_per_problem": [r.tokens_sampled / len(both[0]) for r in (team, solo)],
    }  # fmt: skip


# What a person sees


def heading(result: dict) -> str:
    """What a result rests on."""
    return (
        "  model {model}, agents {agents}, rounds {rounds}, router {router}, mode {mode}\n"
        "  at most {max_new_tokens} tokens a message, temperature {temperature:g}, prompts {prompts}\n"
        "  grader {grader}, seed {seed}, {problems:,} problems x {rollouts_per_problem}"
    ).format(**result)


def rows(result: dict) -> list[tuple[str, str]]:
    """(name, value with interval): avg@k, pass@2, ... or the same of returns; then what `mode` adds."""
    r, k = result, result["rollouts_per_problem"]
    mean, best, key = ("return", "best", "return_at_k") if r["partial"] else ("avg", "pass", "avg_at_k")
    at, intervals = r[f"{best}_at"], r[f"{best}_at_ci"]
    found = [(f"{mean}@{k}" if j == "1" else f"{best}@{j}", at[j], intervals[j]) for j in at]
    if r["mode"] in ("vote", "best_of"):
        found.append((f"{r['mode']} {k}", r[key], r[f"{key}_ci"]))
    if r["partial"]:
        found.append(("accuracy", r["pass_at"]["1"], r["pass_at_ci"]["1"]))
    shown = [(name, f"{value:.3f} [{low:.3f}, {high:.3f}]") for name, value, (low, high) in found]
    if equal := r.get("equal_tokens"):
        costs = zip(equal["rollouts_per_problem"], equal["tokens_per_problem"])
        for who, (drawn, tokens) in zip(("team", "solo"), costs):
            shown.append((who, f"{equal[who]:.3f}, {drawn} x {tokens / drawn:,.1f} tokens"))
        low, high = equal["difference_ci"]
        shown.append(("difference", f"{equal['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"))
    return shown


class Table:
    """Results as they come: a single one with transcripts, or several as lines of a table."""

    def __init__(self, several: bool):
        self.several, self.above = several, ""

    def add(self, result: dict, rollouts: dict[str, Rollouts]) -> str:
        name, team, above, found = result["benchmark"], result["team"], heading(result), rows(result)
        if not self.several:
            lines = [f"{name}: {team}, {result['seconds']:.1f} s", above]
            lines += [f"  {what:14s}{value}" for what, value in found]
            return "\n".join([*lines, show([*rollouts.values()][-1], result["roles"])])
        lines = [above] if above != self.above else []  # what results rest on stands where it changes
        self.above = above
        cells = "".join(f"{f'{value} {what}':31s} " for what, value in found[:1] + found[1:][-1:])
        return "\n".join([*lines, f"{name:9s} {cells}{team}"])


def show(rollouts: Rollouts, roles: list[str], count: int = 3) -> str:
    """The first rollout of `count` problems, one message a line."""
    lines = []
    for r in range(0, len(rollouts.messages), rollouts.group_size)[:count]:
        problem, value = rollouts.problems[r], rollouts.returns[r].item()
        verdict = {0.0: "wrong", 1.0: "right"}.get(value, f"return {value:.3g}")
        lines.append(f"\n{problem.text}   (answer {problem.answer}; {verdict})")
        lines += [f"  {roles[m.agent]}: {m.text}" for m in rollouts.messages[r]]
    return "\n".join(lines)


def samples(result: dict, rollouts: dict[str, Rollouts]) -> Iterator[dict]:
    """Every transcript with its return, for `--samples`."""
    for who, drawn in rollouts.items():
        for r, (problem, messages) in enumerate(zip(drawn.problems, drawn.messages)):
            written = [{"agent": m.agent, "text": m.text, "stopped": m.stopped} for m in messages]
            place = {"benchmark": result["benchmark"], "team": result["team"], "by": who}
            place["sample"] = r % drawn.group_size
            about = dataclasses.asdict(problem) | {"messages": written}
            yield place | about | {"return": drawn.returns[r].item()}
