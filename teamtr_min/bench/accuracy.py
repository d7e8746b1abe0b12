"""How often a team is right, or what its mean return is, on problems that it was never trained on.

Every problem gets k rollouts at the team's own temperature. avg@k is the share of all rollouts with a return
of 1. pass@j is the chance that the best of j rollouts has, estimated without bias from the k that were drawn.
Where a task gives partial credit, returns other than 0 and 1, the mean return and the expected best return
of j rollouts are shown, and the accuracy beside them. All intervals are 95%, over problems.

    team       all rollouts of the team count
    vote       the answer that most of k rollouts give
    best_of    of k rollouts the one that the team itself finds likeliest, per token
    solo       one agent takes every turn; compared with the team on the same problems at equal tokens
"""

import collections
import dataclasses
import gc
import hashlib
import math
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.files import UserError
from teamtr_min.hf.weights import pinned
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run.loading import build_team, roles_of
from teamtr_min.run.log import mean_interval
from teamtr_min.run.memory import Plan, peak, plan_evaluation
from teamtr_min.run.run import newest_run
from teamtr_min.tasks import TASKS, Problem, load_task, read_problems
from teamtr_min.tasks.generated import Generated
from teamtr_min.tasks.task import Message, Task
from teamtr_min.team import Team, load_router

HELD_OUT = 2048  # problems, unless a count is asked for
MODES = ("team", "solo", "best_of", "vote")


class Subject(NamedTuple):
    """A team to evaluate: the agents of a run, or copies of a model."""

    name: str
    config: Config
    sources: list[Path] | None = None  # agents/0..n-1 of the run; None: the models of `config`

    @property
    def alone(self) -> "Subject":
        """Its first agent, which takes as many turns as the team."""
        c = self.config
        changes = {"agents": 1, "model": c.models[0], "rounds": c.turns, "router": "round-robin"}
        config = dataclasses.replace(c, roles="", lr_scale="", **changes)
        return Subject(self.name, config, self.sources and self.sources[:1])


def find_subject(team: str | None, flags: dict, task: str | None = None) -> Subject:
    """The run `team`; without one the newest run of `task`; without any, copies of the model of `task`.

    `flags` are fields of Config from the command line. --model or --agents ask for an untrained team. Raises
    UserError for a directory that is no run, or that holds no agents.
    """
    untrained = sorted({"model", "agents"} & flags.keys())
    if team and untrained:
        raise UserError(f"--team names trained agents with their models: leave out --{untrained[0]}")
    if not team and not untrained:
        team = newest_run("summary.json", lambda run: is_of(run, task))
    if not team:
        return Subject("untrained team", pinned(Config(**{"task": task, **flags})))
    run = Path(team)
    config = Config.load(run / "config.json", **{"batch_rows": 0, **flags})  # 0: as many as fit here
    if not (run / "agents").is_dir():
        raise UserError(f"{run} holds no trained agents yet")
    return Subject(str(run), config, [run / "agents" / str(j) for j in range(config.agents)])


def is_of(run: Path, task: str | None) -> bool:
    """Whether a directory is a run of `task`, or of any with None."""
    try:
        return (run / "agents").is_dir() and task in (None, Config.load(run / "config.json").task)
    except UserError:
        return False


class Exam(NamedTuple):
    """A team, a task, and the problems of the task that are put to it."""

    subject: Subject  # its config names the task
    task: Task
    problems: list[Problem]

    @property
    def name(self) -> str:
        return f"{self.subject.config.task}, {self.subject.name}"

    @property
    def alone(self) -> "Exam":
        alone = self.subject.alone
        return Exam(alone, load_task(alone.config), self.problems)


def prepare(subject: Subject, name: str | None, count: int | None, data: str | None) -> Exam:
    """The task `name`, or the team's own: `count` problems, or all, of `data`; without it held-out ones."""
    name = name or subject.config.task
    own = subject.config.data if subject.config.task == name else ""
    generated = issubclass(TASKS.get(name, object), Generated)  # such a task reads no data for itself
    config = dataclasses.replace(subject.config, task=name, data="" if generated else data or own)
    task = load_task(config)
    if data and hasattr(task, "fields") and not Path(data).is_dir():
        problems = read_problems(data, *task.fields)[:count]
    else:
        problems = task.sample_problems(count or HELD_OUT, rng.generator(0, "held-out"), held_out=True)
    return Exam(subject._replace(config=config), task, problems)


class Evaluator:
    """Evaluates teams, and keeps the one that it loaded last: for the next benchmark, and for `solo`."""

    def __init__(self, mode: str = "team", k: int = 1, ranks: Ranks = ALONE):
        if mode in ("best_of", "vote") and k < 2:
            raise UserError(f"--mode {mode} chooses among rollouts; give --k of at least 2")
        self.mode, self.k, self.ranks = mode, k, ranks
        self.team: Team | None = None
        self.loaded: list[tuple] = []  # its agents: place, source, whether it is a model
        self.plan: Plan | None = None

    def evaluate(self, exam: Exam) -> tuple[dict, dict[str, Rollouts]]:
        """What `--json` prints, and the rollouts behind it by who wrote them: "team", "solo"."""
        begin, task, solo = time.perf_counter(), exam.task, self.mode == "solo"
        votes = callable(getattr(task, "answer", None))
        if not votes and (self.mode == "vote" or solo and self.k > 1):
            raise UserError("to vote, a task needs a method answer(messages) -> str | None")
        exam = self.without_long(exam) if exam.subject.config.drop_long else exam
        result = {"benchmark": exam.subject.config.task, "mode": self.mode, "k": self.k} | setting(exam)
        exams = {"team": exam, "solo": exam.alone} if solo else {"team": exam}
        rollouts = {who: self.sample(its, self.k) for who, its in exams.items()}
        if solo:
            most = max(drawn.tokens_sampled for drawn in rollouts.values())
            for who, its in exams.items():  # who writes less gets as many more rollouts
                k = self.k * most // max(rollouts[who].tokens_sampled, 1)
                if k > self.k and votes:
                    rollouts[who] = self.sample(its, k)
            result["equal_tokens"] = at_equal_tokens(*rollouts.values(), task)
        result |= scores([*rollouts.values()][-1], self.mode, self.k, task)
        result |= {"memory_peak": peak(self.plan.device), "memory_planned": self.plan.total}
        return result | {"seconds": time.perf_counter() - begin}, rollouts

    def without_long(self, exam: Exam) -> Exam:
        """Without problems that outgrow a model: the plan of memory makes the task leave them out."""
        config, sources = exam.subject.config, exam.subject.sources or exam.subject.config.model_of_each
        before = {problem.id for problem in exam.task.all_problems()}
        plan_evaluation(config, exam.task, exam.problems, self.k, sources, ranks=self.ranks)
        gone = before - {problem.id for problem in exam.task.all_problems()}
        return exam._replace(problems=[problem for problem in exam.problems if problem.id not in gone])

    def sample(self, exam: Exam, k: int) -> Rollouts:
        """k rollouts of the subject on every problem."""
        subject, config, task = exam.subject, exam.subject.config, exam.task
        sources = [str(source) for source in subject.sources or config.model_of_each]
        roles, place = roles_of(config, task), (config.device, config.dtype)
        wanted = [(place, source, role.tool is None) for source, role in zip(sources, roles)]
        loaded = self.loaded[: len(wanted)] == wanted
        if not loaded:
            self.team, self.loaded = None, []
            gc.collect()  # its memory serves the next team
        config, self.plan = plan_evaluation(config, task, exam.problems, k, sources, loaded, self.ranks)
        if not loaded:
            self.team, self.loaded = build_team(config, task, self.ranks, sources), wanted
        agents = [dataclasses.replace(agent, role=role) for agent, role in zip(self.team.agents, roles)]
        router, how = load_router(config.router), (config.temperature, config.max_new_tokens)
        team = Team(agents, task, router, config.rounds, *how, config.batch_rows, self.ranks)
        path = rng.RngPath(config.seed, "eval")
        return collect(team, exam.problems, k, path, label=f"evaluating {Path(config.task).stem}")


def setting(exam: Exam) -> dict:
    """What a result rests on besides weights."""
    c, roles = exam.subject.config, roles_of(exam.subject.config, exam.task)
    prompts = "\0".join(text for role in roles for text in (role.name, role.system))
    names = ("model", "agents", "router", "rounds", "max_new_tokens", "temperature", "seed", "data")
    return {
        "team": exam.subject.name,
        **{name: getattr(c, name) for name in names},
        "roles": [role.name for role in roles],
        "prompts": f"{hashlib.sha256(prompts.encode()).hexdigest()[:8]} of {c.roles or 'the task'}",
        "grader": getattr(exam.task, "grader", "the task's own"),
        "fingerprint": exam.task.fingerprint(),
        "problems": len(exam.problems),
    }


# Statistics


def difference_interval(values: Tensor) -> tuple[float, list[float]]:
    """Mean of paired differences (P,) in [-1, 1] and its 95% interval [Agresti and Min 2005].

    Two problems are added, with half a win and half a loss each: without any difference it is not [0, 0].
    """
    n, values = len(values) + 2, values.double()
    mean = values.sum().item() / n
    half = 1.96 * math.sqrt(((values.square().sum().item() + 1) / n - mean * mean) / n)
    return values.mean().item(), [max(-1.0, mean - half), min(1.0, mean + half)]


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
    found = {"rollouts_per_problem": drawn, "partial": bool(((returns != 0) & (returns != 1)).any())}
    each = {"avg_at_k": (chosen == 1).double().mean(1), "return_at_k": chosen.double().mean(1)}
    each["pass_at_k"] = best_of(right, k)
    for name, values in each.items():
        found[name], found[f"{name}_ci"] = mean_interval(values)
    for name, values in (("pass_at", right), ("best_at", returns)):
        found[name], found[f"{name}_ci"] = {}, {}
        for j in sorted({2**i for i in range(drawn.bit_length())} | {drawn}):
            found[name][str(j)], found[f"{name}_ci"][str(j)] = mean_interval(best_of(values, j))
    return found | {"tokens_sampled": rollouts.tokens_sampled}


def pick(rollouts: Rollouts, mode: str, task: Task) -> Tensor:
    """(P, 1) return of the rollout that `mode` chooses for each problem; no choice looks at returns."""
    k = rollouts.group_size
    groups = [rollouts.messages[r : r + k] for r in range(0, len(rollouts.messages), k)]
    best = []
    for group in groups:
        if mode == "best_of":
            best.append(max(range(k), key=lambda g, group=group: confidence(group[g])))
            continue
        answers = [task.answer(messages) for messages in group]
        votes = collections.Counter(answer for answer in answers if answer is not None)
        best.append(answers.index(votes.most_common(1)[0][0]) if votes else 0)
    return rollouts.grouped_returns.gather(1, torch.tensor(best)[:, None])


def confidence(messages: list[Message]) -> float:
    """Mean log-prob of a rollout's sampled tokens, under the agents that wrote them."""
    logprobs = [value for message in messages for value in message.logprobs]
    return sum(logprobs) / max(len(logprobs), 1)


def at_equal_tokens(team: Rollouts, solo: Rollouts, task: Task) -> dict:
    """Team and soloist on the same problems for equal tokens; each votes where it has several rollouts."""
    both = [pick(r, "vote", task) if r.group_size > 1 else r.grouped_returns for r in (team, solo)]  # (P, 1)
    difference, interval = difference_interval((both[0] - both[1]).flatten())
    return {
        "team": both[0].mean().item(),
        "solo": both[1].mean().item(),
        "difference": difference,
        "difference_ci": interval,
        "rollouts_per_problem": [team.group_size, solo.group_size],
        "tokens_per_problem": [r.tokens_sampled / len(both[0]) for r in (team, solo)],
    }


# What a person sees


def heading(result: dict) -> str:
    """What a result rests on, in lines of at most 80 characters."""
    r = result
    counted = (f"{r[name]:,} {name}" if r[name] > 1 else f"1 {name[:-1]}" for name in ("agents", "rounds"))
    parts = [f"{next(counted)} of {r['model']}", next(counted), f"router {r['router']}", f"mode {r['mode']}"]
    parts += [f"at most {r['max_new_tokens']} tokens a message", f"temperature {r['temperature']:g}"]
    parts += [f"prompts {r['prompts']}", f"grader {r['grader']}", f"seed {r['seed']}"]
    parts += [f"{r['problems']:,} problems x {r['rollouts_per_problem']}"]
    text = ", ".join(part.replace(" ", "\xa0") for part in parts)  # a part is not broken
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="  ").replace("\xa0", " ")


def rows(result: dict) -> list[tuple[str, str]]:
    """(name, value with interval): avg@k, then pass@j for j = 2, 4, ... up to k; or the same of returns."""
    r, drawn = result, result["rollouts_per_problem"]
    kind, key = ("best", "return_at_k") if r["partial"] else ("pass", "avg_at_k")

    def cell(name: str, j: str = "") -> str:
        value, (low, high) = (r[n][j] if j else r[n] for n in (name, f"{name}_ci"))
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    found = [(f"return@{drawn}" if r["partial"] else f"avg@{drawn}", cell(f"{kind}_at", "1"))]
    found += [(f"{kind}@{j}", cell(f"{kind}_at", j)) for j in r[f"{kind}_at"] if j != "1"]
    if r["mode"] in ("vote", "best_of"):
        found.append((f"{r['mode']} of {drawn}", cell(key)))
    return found + ([("accuracy", cell("pass_at", "1"))] if r["partial"] else [])


def equal_tokens(result: dict) -> list[str]:
    if not (equal := result.get("equal_tokens")):
        return []
    each = zip(("team", "solo"), equal["rollouts_per_problem"], equal["tokens_per_problem"])
    low, high = equal["difference_ci"]
    lines = [
        f"at equal tokens {who} {equal[who]:.3f}, {k} x {tokens / k:,.1f} tokens" for who, k, tokens in each
    ]
    return [*lines, f"difference {equal['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"]


class Table:
    """The results of these exams as they come: one with transcripts, or several in a table."""

    def __init__(self, exams: list[Exam]):
        self.several, self.above = len(exams) > 1, ""
        self.width = max((len(exam.subject.config.task) for exam in exams), default=0)

    def add(self, result: dict, rollouts: dict[str, Rollouts]) -> str:
        if not self.several:
            who = f"{result['team']}, first agent alone" if result["mode"] == "solo" else result["team"]
            lines = [f"{result['benchmark']}: {who}, {result['seconds']:.1f} s", heading(result)]
            lines += [f"  {name:14s}{value}" for name, value in rows(result)]
            lines += [f"  {line}" for line in equal_tokens(result)]
            return "\n".join([*lines, show([*rollouts.values()][-1], result["roles"])])
        above, before = heading(result), self.above
        self.above = above
        found = rows(result)
        cells = "".join(f"{f'{value} {name}':32s}" for name, value in found[:1] + found[1:][-1:])
        lines = [above] if above != before else []  # what results rest on stands where it changes
        lines.append(f"{result['benchmark']:{self.width}s}  {cells}{result['team']}")
        return "\n".join([*lines, *(f"{'':{self.width}s}  {line}" for line in equal_tokens(result))])


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
            yield {
                "benchmark": result["benchmark"],
                "team": result["team"],
                "by": who,
                "sample": r % drawn.group_size,
                **dataclasses.asdict(problem),
                "messages": [{"agent": m.agent, "text": m.text, "stopped": m.stopped} for m in messages],
                "return": drawn.returns[r].item(),
            }
