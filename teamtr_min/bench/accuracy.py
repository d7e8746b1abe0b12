"""How often a team is right: avg@k and unbiased pass@k over problems it was never trained on.

Every problem gets k rollouts at the team's own temperature. avg@k is the mean return 1 over all of them;
pass@j is the chance that at least one of j rollouts is right, estimated without bias from the k that were
drawn [Chen et al. 2021]: 1 - C(k - c, j) / C(k, j) for c right ones. Intervals are 95% bootstrap percentiles
over problems.

    team       the team as it is
    vote       the answer that most of k rollouts give
    best_of    of k rollouts the one that the team itself finds likeliest, per token
    solo       one agent takes every turn; beside the team on the same problems, both at equal tokens
"""

import collections
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from teamtr_min.bench import kept
from teamtr_min.config import SHIPPED, Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE, Ranks
from teamtr_min.engine.lora import hash_agent
from teamtr_min.extras.certificate import mean_with_interval
from teamtr_min.files import UserError, sha256
from teamtr_min.hf.weights import DTYPES, find_model, pinned
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run.memory import plan_evaluation
from teamtr_min.run.run import newest_run
from teamtr_min.run.system import peak, set_threads, size
from teamtr_min.tasks import Problem, load_task, read_problems
from teamtr_min.team import Message, Team, load_router, load_team, placement

HELD_OUT = 2048  # problems, unless a count is asked for
MODES = ("team", "solo", "best_of", "vote")


@dataclass(frozen=True)
class Subject:
    """The team to evaluate: a run's agents, or fresh copies of a model."""

    name: str
    config: Config
    sources: list[Path] | None  # the run's agents

    @property
    def hash(self) -> str:
        """Of all agents' weights in turn order: what was evaluated, whatever its directory is called."""
        directories = [find_model(source) for source in self.sources or self.config.models]
        one = {directory: hash_agent(directory) for directory in set(directories)}
        return hashlib.sha256("".join(one[d] for d in directories).encode()).hexdigest()[:16]

    @property
    def kept_in(self) -> Path:
        return (Path(self.name) if self.sources else Path("runs")) / "eval.jsonl"

    @property
    def solo(self) -> "Subject":
        """Its first agent alone, taking as many turns as the team."""
        config = self.config.of_one(self.config.models[0], rounds=self.config.turns, router="round-robin")
        return Subject(f"{self.name}, first agent alone", config, self.sources and self.sources[:1])


def find_subject(team: str | None, changes: dict, task: str | None = None) -> Subject:
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
        team = newest_run("summary.json", lambda run: (run / "agents").is_dir() and is_of(run, task))
    if not team:
        return Subject("untrained team", pinned(Config(**({"task": task} if task else {}) | changes)), None)
    directory = Path(team)
    config = Config.load(directory / "config.json", {"batch_rows": 0} | changes)  # 0: as many as fit here
    sources = [directory / "agents" / str(j) for j in range(config.agents)]
    if not all(source.is_dir() for source in sources):
        raise UserError(f"{directory} holds no trained agents (agents/0 to agents/{config.agents - 1})")
    return Subject(str(directory), config, sources)


def is_of(run: Path, task: str | None) -> bool:
    """Whether this is a run of `task`, or with None of any; one that cannot be read is of none."""
    try:
        return Config.load(run / "config.json").task == task or task is None
    except UserError:
        return False


class Evaluation(NamedTuple):
    """What `--json` prints, and the rollouts it was read from, unless it had been measured before."""

    result: dict
    rollouts: Rollouts | None


class Loader:
    """Holds the team that was loaded last: for its next benchmark, and for its first agent alone."""

    def __init__(self, ranks: Ranks = ALONE):
        self.ranks, self.team, self.key, self.plan = ranks, None, None, None

    def load(self, exam: "Exam", k: int, sources: list[Path] | None) -> Team:
        """The team for k rollouts of each problem, after its plan of memory is on the terminal."""
        config, roles = exam.config, exam.task.roles(exam.config.agents)
        models = list(map(str, sources or config.model_of_each))
        key = config.device, config.dtype, models
        if not self.team or self.key[:2] != key[:2] or self.key[2][: len(models)] != models:
            self.team = None
            gc.collect()  # its memory serves the next, also of spread weights, which refer in circles
        config, self.plan = plan_evaluation(
            config, exam.task, exam.problems, k, models, bool(self.team), self.ranks
        )
        if self.ranks.first:
            print(self.plan, file=sys.stderr, flush=True)  # a result goes to stdout
        set_threads(config.shipped)
        if not self.team:
            self.team, self.key = load_team(config, roles, sources, self.ranks), key
        agents = [dataclasses.replace(agent, role=role) for agent, role in zip(self.team.agents, roles)]
        how = config.temperature, config.max_new_tokens, config.batch_rows
        return Team(agents, load_router(config.router), config.rounds, *how, self.ranks)


@dataclass(frozen=True)
class Exam:
    """A task and those of its problems that are put to a team."""

    config: Config  # the team's, with this task
    task: object
    problems: list[Problem]

    @property
    def hash(self) -> str:
        """Of what the team is told and asked, of the answers, and of one's own files that take part."""
        roles = [(role.name, role.system) for role in self.task.roles(self.config.agents)]
        files = [sha256(Path(f)) for f in (self.config.task, self.config.router) if f.endswith(".py")]
        content = roles, [(p.text, p.answer) for p in self.problems], files
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def run(
    subject: Subject,
    task_name: str,
    mode: str,
    loader: Loader,
    *,
    k: int,
    count: int | None,
    data: str | None,
    again: bool = False,
) -> Evaluation:
    """Evaluate `subject` in one of MODES, k rollouts per problem, and keep the result.

    The problems are the first `count` of the file `data`, all without a count; or that many held-out ones.
    What was measured before, with the same weights, problems and settings, is not measured `again`.
    """
    if mode in ("best_of", "vote") and k < 2:
        raise UserError(f"--mode {mode} chooses among rollouts; give --k of at least 2")
    start = time.perf_counter()
    exam = prepare(subject, task_name, count, data)
    task = exam.task
    if (mode == "vote" or mode == "solo" and k > 1) and not callable(getattr(task, "answer", None)):
        raise UserError("to vote, a task needs a method answer(messages) -> str | None")
    who = subject.solo if mode == "solo" else subject
    result = {
        "benchmark": task_name,
        "team": subject.name,
        "model": who.config.model,
        "mode": mode,
        "agents": who.config.agents,
        "rounds": who.config.rounds,
        "router": subject.config.router,
        "k": k,
        "problems": len(exam.problems),
        "temperature": subject.config.temperature,
        "max_new_tokens": subject.config.max_new_tokens,
        "seed": subject.config.seed,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == placement(subject.config)[1]),
        "data": data,
        "grader": getattr(task, "grader", "exact" if task_name in SHIPPED else "own"),
        "team_hash": subject.hash,
        "model_hash": who.hash,
        "task_hash": exam.hash,
    }
    if not again and (before := loader.ranks.agree(kept.find(result, subject.kept_in))):
        names = {name: result[name] for name in kept.NAMES}
        return Evaluation(before | names | {"kept": True}, None)
    rollouts = sample(subject, exam, k, loader)
    if mode == "solo":
        alone = prepare(who, task_name, count, data)
        both = [(subject, exam, rollouts), (who, alone, sample(who, alone, k, loader))]
        most = max(r.tokens_sampled for _, _, r in both)
        for i, (player, its, drawn) in enumerate(both):  # whoever says less gets as many more rollouts
            affordable = k * most // max(drawn.tokens_sampled, 1)
            if affordable > k and callable(getattr(task, "answer", None)):
                both[i] = player, its, sample(player, its, affordable, loader)
        together, rollouts = both[0][2], both[1][2]
        result["equal_tokens"] = at_equal_tokens(together, rollouts, task, subject.config.seed)
    drawn = rollouts.group_size
    right = (rollouts.grouped_returns == 1).sum(1)  # (P,)
    chosen = right / drawn if mode in ("team", "solo") else pick(rollouts, mode, task)
    for name, values in {"avg_at_k": chosen, "pass_at_k": pass_at(right, drawn, k)}.items():
        result[name], result[f"{name}_ci"] = mean_with_interval(values, subject.config.seed)
    result["pass_at"], result["pass_at_ci"] = {}, {}
    for j in sorted({2**i for i in range(drawn.bit_length())} | {drawn}):
        values = pass_at(right, drawn, j)
        result["pass_at"][str(j)], result["pass_at_ci"][str(j)] = mean_with_interval(
            values, subject.config.seed
        )
    result |= {"memory_peak": peak(loader.plan.device), "memory_planned": loader.plan.total}
    result |= {"tokens_sampled": rollouts.tokens_sampled, "seconds": time.perf_counter() - start}
    if loader.ranks.first:
        result = kept.append(result, subject.kept_in)
    return Evaluation(result, rollouts)


def prepare(subject: Subject, task_name: str, count: int | None, data: str | None) -> Exam:
    own_data = subject.config.data if subject.config.task == task_name else ""
    task_data = "" if task_name in SHIPPED else data or own_data
    config = dataclasses.replace(subject.config, task=task_name, data=task_data)
    task = load_task(config)
    if data and hasattr(task, "fields") and not Path(data).is_dir():
        problems = read_problems(data, *task.fields)[:count]
    else:
        problems = task.sample_problems(count or HELD_OUT, rng.generator(0, "held-out"), held_out=True)
    return Exam(config, task, problems)


def sample(subject: Subject, exam: Exam, k: int, loader: Loader) -> Rollouts:
    """k rollouts of the subject on every problem."""
    config, task = exam.config, exam.task
    team = loader.load(exam, k, subject.sources)
    path, label = rng.RngPath(config.seed, "eval"), f"evaluating {Path(config.task).stem}"
    return collect(team, task, exam.problems, k, path, label=label, compact=True)


def pick(rollouts: Rollouts, mode: str, task) -> Tensor:
    """(P,) whether the rollout that `mode` chooses for each problem is right; no choice looks at returns."""
    right, k = rollouts.grouped_returns == 1, rollouts.group_size
    groups = [rollouts.messages[p : p + k] for p in range(0, len(rollouts.messages), k)]
    if mode == "best_of":
        best = [max(range(k), key=lambda g, group=group: confidence(group[g])) for group in groups]
    else:
        best = []
        for group in groups:
            answers = [task.answer(messages) for messages in group]
            votes = collections.Counter(a for a in answers if a is not None)
            best.append(answers.index(votes.most_common(1)[0][0]) if votes else 0)
    return right[range(len(groups)), best].double()


def confidence(messages: list[Message]) -> float:
    """Mean log-prob of a rollout's sampled tokens, under those who wrote them."""
    logprobs = [value for message in messages for value in message.logprobs]
    return sum(logprobs) / max(len(logprobs), 1)


def at_equal_tokens(team: Rollouts, solo: Rollouts, task, seed: int) -> dict:
    """Team and soloist on the same problems for equal tokens; each votes where it has several rollouts."""
    both = [pick(r, "vote", task) if r.group_size > 1 else (r.grouped_returns == 1)[:, 0].double()
            for r in (team, solo)]  # fmt: skip
    difference, interval = mean_with_interval(both[0] - both[1], seed)  # paired
    problems = len(both[0])
    return {
        "team": both[0].mean().item(),
        "solo": both[1].mean().item(),
        "difference": difference,
        "difference_ci": interval,
        "rollouts_per_problem": [team.group_size, solo.group_size],
        "tokens_per_problem": [team.tokens_sampled / problems, solo.tokens_sampled / problems],
    }


def pass_at(right: Tensor, drawn: int, j: int) -> Tensor:
    """Unbiased chance that one of j rollouts is right, from the `right` (P,) ones among `drawn`."""
    total = math.comb(drawn, j)
    return right.new_tensor([1 - math.comb(drawn - c, j) / total for c in right.tolist()], dtype=float)


def table(result: dict) -> str:
    """The result in words: avg@k, pass@j for j = 1, 2, 4, ... up to k, and what the mode adds."""
    drawn = max(map(int, result["pass_at"]))  # rollouts per problem: k, or more at equal tokens
    players = "first agent alone" if result["mode"] == "solo" else f"{result['agents']} agents"
    lines = [
        f"{result['benchmark']}: {result['team']}, {players}, {result['problems']:,} problems x {drawn}, "
        f"temperature {result['temperature']:g}, graded: {result['grader']}, {result['seconds']:.1f} s"
    ]
    for name, j in [(f"avg@{drawn}", "1"), *((f"pass@{j}", j) for j in result["pass_at"])]:
        low, high = result["pass_at_ci"][j]
        lines.append(f"  {name:8s} {result['pass_at'][j]:.3f}  [{low:.3f}, {high:.3f}]")
    if result["mode"] in ("vote", "best_of"):
        low, high = result["avg_at_k_ci"]
        lines.append(f"  {result['mode']:8s} {result['avg_at_k']:.3f}  [{low:.3f}, {high:.3f}]  of {drawn}")
    if equal := result.get("equal_tokens"):
        (k, m), (t, s), (low, high) = (
            equal[name] for name in ("rollouts_per_problem", "tokens_per_problem", "difference_ci")
        )
        lines.append(
            f"  at equal tokens: team {equal['team']:.3f} ({k} x, {t:.1f} tokens a problem), "
            f"solo {equal['solo']:.3f} ({m} x, {s:.1f}); "
            f"difference {equal['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    if "memory_peak" in result:
        used, planned = size(result["memory_peak"]), size(result["memory_planned"])
        lines.append(f"  memory peak {used} of {planned} planned")
    if result.get("kept"):
        lines.append(f"  {kept.when(result)}")
    return "\n".join(lines)


def show(rollouts: Rollouts, count: int) -> str:
    """The first `count` transcripts, one message a line; a terminal gets them in colour."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def ink(code: int, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    agents = itertools.cycle((36, 33, 35, 34, 96, 93, 95, 94))  # neither the green nor the red of the verdict
    names = [ink(code, agent.role.name) for code, agent in zip(agents, rollouts.team.agents)]
    lines = []
    for r in range(0, len(rollouts.messages), rollouts.group_size)[:count]:
        problem, verdict = (
            rollouts.problems[r],
            ink(32, "right") if rollouts.returns[r] == 1 else ink(31, "wrong"),
        )
        lines.append(f"\n{problem.text}   (answer {problem.answer}; {verdict})")
        lines += [f"  {names[m.agent]}: {m.text}" for m in rollouts.messages[r]]
    return "\n".join(lines)
