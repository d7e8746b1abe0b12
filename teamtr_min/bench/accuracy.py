"""How often a team is right, or what its mean return is, on problems that it was never trained on.

Every problem gets k rollouts at the team's own temperature. avg@k is the share of all rollouts with a return
of 1. pass@j is the chance that the best of j rollouts has, estimated without bias from the k that were drawn;
with partial credit mean and best return are shown beside. All intervals are 95%, over problems.
"""

import collections
import dataclasses
import gc
import hashlib
import math
import os
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import Ranks
from teamtr_min.files import UserError, read_json, sha256, to_json
from teamtr_min.hf.weights import hub_data, pinned
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run.loading import build_team, placement
from teamtr_min.run.log import mean_interval, prompts_in_use
from teamtr_min.run.memory import in_use, plan_evaluation
from teamtr_min.run.run import fingerprint, newest_run
from teamtr_min.tasks import TASKS, Problem, Task, load_task, read_problems
from teamtr_min.team import Team

HELD_OUT = 2048  # problems, unless a count is asked for
HEADING = """model agents rounds router mode max_new_tokens temperature prompts grader
    problems left_out k seed seeds shots""".split()
MODES = {
    "team": "all rollouts count",
    "solo": "the first agent takes every turn",
    "best_of": "of k rollouts the one that the team itself finds likeliest, per token",
    "vote": "the answer that most of k rollouts give",
}


class Exam(NamedTuple):
    """A team to evaluate; and once it is prepared, a task and the problems of it that are put to the team."""

    team: str  # directory of the run
    config: Config  # of the team; it names the task
    sources: list[Path] | None = None  # agents/0..n-1 of the run; None: the models of `config`
    task: Task | None = None
    problems: list[Problem] = []


def find_team(team: str | None, flags: dict, task: str | None = None) -> Exam:
    """The run `team`; without one the newest run of `task`; without any, copies of the model of `task`.
    `flags` are fields of Config from the command line. --model or --agents ask for an untrained team."""
    untrained = sorted({"model", "agents"} & flags.keys())
    if team and untrained:
        raise UserError(f"--team names trained agents with their models: leave out --{untrained[0]}")
    if not team and not untrained:
        team = newest_run("agents", lambda run: task in (None, read_json(run / "config.json").get("task")))
    if not team:
        return Exam("untrained team", pinned(Config(**{"task": task, **flags})))
    run = Path(team)
    config = Config.load(run / "config.json", **{"batch_rows": 0, **flags})  # 0: as many as fit here
    if not (run / "agents").is_dir():
        raise UserError(f"{run} holds no agents: a run saves them when it ends, or is stopped by Ctrl-C")
    then = read_json(run / "config.json").get("fingerprint", {})
    for kind in {"task", "router", "roles"} - flags.keys():
        file = Path(getattr(config, kind))
        if file.is_file() and then.get(f"{kind} file", sha256(file)) != sha256(file):
            print(f"{run} was trained with another {kind} file than {file} is now", file=sys.stderr)
    return Exam(str(run), config, [run / "agents" / str(j) for j in range(config.agents)])


def prepare(exam: Exam, name: str | None, count: int | None, data: str | None, shots: int = 0) -> Exam:
    """The task `name`, or the team's own: `count` problems, or all, of `data`; without it held-out ones. In
    front of each stand `shots` training problems with their answers. Raises UserError."""
    name = name or exam.config.task
    own = exam.config.data if exam.config.task == name else ""
    if data and own and os.path.realpath(data) == os.path.realpath(own):  # the run has its held-out part
        data = None
    generated = getattr(TASKS.get(name), "fields", None)  # such a task reads no data for itself
    read = "" if generated else data or own
    config = dataclasses.replace(exam.config, task=name, data=(hub_data(read) or ("", read))[1])
    task = load_task(config)
    readable = data and getattr(task, "fields", None)
    if readable and (generated or not (Path(data).is_dir() or hub_data(data))):
        problems = read_problems(data, *task.fields)[:count]
    else:
        problems = task.sample_problems(count or HELD_OUT, rng.generator(0, "held-out"), held_out=True)
    if shots:
        examples, view = task.sample_problems(shots, rng.generator(config.seed, "shots")), task.view
        if {p.text for p in examples} & {p.text for p in problems}:
            raise UserError("--shots are training problems; --data DIR tells them from those to evaluate on")
        solved = lambda agent: [f"{view(p, agent)}\nAnswer: {p.answer}" for p in examples]  # noqa: E731
        task.view = lambda problem, agent: "\n\n".join([*solved(agent), view(problem, agent)])
        task.examples = examples
    return exam._replace(config=config, task=task, problems=problems)


def run(exams: list[Exam], args: Namespace, ranks: Ranks) -> Iterator[tuple[dict, str]]:
    """Each result, and its text: of a single one with transcripts, of several lines of a table."""
    writes, above = args.samples and ranks.first and exams, ""
    file = open(args.samples, "w", encoding="utf-8") if writes else None
    for exam in exams:
        result, rollouts = evaluate(exam, args, ranks, file)
        if file:
            file.flush()  # a full disk is an error now, not at the end
        facts = result | {"shots": len(result["shots"])}
        heading = textwrap.fill(", ".join(f"{name} {facts[name]}" for name in HEADING), 88)
        heading = textwrap.indent(heading, "  ")  # what the result rests on
        name, team, found = result["benchmark"], result["team"], [*rows(result)]
        if len(exams) == 1:
            lines = [f"{name}: {team}, {result['seconds']:.1f} s", heading]
            lines += [result["prompts_in_use"]] if "prompts_in_use" in result else []
            lines += [f"  {what:14s}{value}" for what, value in found]
            lines += transcripts(rollouts, result["roles"])
        else:
            cells = [f"{f'{value} {what}':31s} " for what, value in (found[result["partial"]], found[-1])]
            lines = [heading] * (heading != above) + [f"{name:9s} {''.join(cells)}{team}"]
        above = heading
        yield result, "\n".join(lines)


def evaluate(exam: Exam, args: Namespace, ranks: Ranks, file: IO | None) -> tuple[dict, Rollouts]:
    """What `--json` prints, and the first seed's rollouts; `file` gets all samples. Raises UserError."""
    begin, config, task = time.perf_counter(), exam.config, exam.task
    mode, k, seeds = args.mode, args.k, args.seeds
    if mode == "vote" and not callable(getattr(task, "answer", None)):
        raise UserError("to vote, a task needs a method answer(messages) -> str | None")
    gc.collect()  # the memory of the team before
    sources, all_problems = exam.sources or config.model_of_each, getattr(task, "all_problems", list)
    before = {problem.id for problem in all_problems()}
    config, plan = plan_evaluation(config, task, exam.problems, k, sources, ranks=ranks)
    long = before - {problem.id for problem in all_problems()}  # with --drop-long
    problems = [problem for problem in exam.problems if problem.id not in long]
    team = build_team(config, task, ranks, sources)
    asked = hashlib.sha256(to_json([vars(problem) for problem in problems]).encode())
    names = ("model", "agents", "router", "rounds", "max_new_tokens", "temperature", "seed", "data")
    result = {
        "benchmark": config.task, "mode": mode, "k": k, "seeds": seeds, "team": exam.team,
        **{name: getattr(config, name) for name in names},
        "roles": [agent.role.name for agent in team.agents], "prompts": config.roles or "the task's",
        "shots": [problem.id for problem in getattr(task, "examples", [])],
        "left_out": len(exam.problems) - len(problems),
        "grader": getattr(task, "grader", "the task's own"),
        "fingerprint": fingerprint(config, team, problems[0]) | {"problems asked": asked.hexdigest()},
        **dict(zip(("device", "dtype"), map(str, placement(config)))), "torch": torch.__version__,
    }  # fmt: skip
    if mode == "solo":
        team = dataclasses.replace(team, router=lambda turn, messages, agents, uniform: 0)
    if config.show_prompts:
        result["prompts_in_use"] = prompts_in_use(team, problems[0])
    collected, place = [], {"benchmark": config.task, "team": exam.team}
    for seed in range(config.seed, config.seed + seeds):
        collected.append(collect(team, problems, k, rng.RngPath(seed, "eval"), f"evaluating {config.task}"))
        for line in samples(team, collected[-1]) if file else ():
            file.write(to_json(place | {"seed": seed} | line) + "\n")
    result |= scores(collected, mode, task)
    result |= {"memory_peak": in_use(plan.device, most=True), "memory_planned": plan.total}
    return result | {"problems": len(problems), "seconds": time.perf_counter() - begin}, collected[0]


def best_of(values: Tensor, j: int) -> Tensor:
    """(P,) expected largest of j values, without bias from the k of each problem (P, k). Of zeros and ones it
    is pass@j: 1 - C(k - c, j) / C(k, j) for c ones [Chen et al. 2021]."""
    k = values.shape[1]
    # The i-th smallest is the largest of C(i, j - 1) choices of j.
    chances = torch.tensor([math.comb(i, j - 1) / math.comb(k, j) for i in range(k)], dtype=torch.float64)
    return values.double().sort(1).values @ chances


def scores(collected: list[Rollouts], mode: str, task: Task) -> dict:
    """Accuracy and return of what `mode` chooses, pass@j and best return of j rollouts: means over problems
    and seeds, `_ci` over problems, and of several seeds `_se`, the standard error over them."""
    k, each = collected[0].group_size, collections.defaultdict(list)  # name -> (P,) of each seed
    for rollouts in collected:
        returns = rollouts.grouped_returns  # (P, k)
        chosen = pick(rollouts, mode, task) if mode in ("vote", "best_of") else returns  # (P, 1) or (P, k)
        each["avg_at_k"].append((chosen == 1).double().mean(1))
        each["return_at_k"].append(chosen.double().mean(1))
        for name, j in {**{2**i: 2**i for i in range((k - 1).bit_length())}, "k": k}.items():  # 2**i < k
            each[f"pass_at_{name}"].append(best_of(returns == 1, j))
            each[f"best_at_{name}"].append(best_of(returns, j))
    found = {"partial": any(((r.returns != 0) & (r.returns != 1)).any().item() for r in collected)}
    for name, values in each.items():
        by_seed = torch.stack(values)  # (seeds, P)
        found[name], found[f"{name}_ci"] = mean_interval(by_seed.mean(0))
        if len(values) > 1:
            found[f"{name}_se"] = by_seed.mean(1).std().item() / len(values) ** 0.5
    return found | {"tokens_sampled": sum(rollouts.tokens_sampled for rollouts in collected)}


def votes(task: Task, answers: list[str | None]) -> list[tuple[str | None, list[int]]]:
    """Each answer and the rollouts that give it, the most frequent first; None, for no answer, last."""
    same, ways = getattr(task, "same", str), collections.defaultdict(list)
    for rollout, answer in enumerate(answers):
        ways[answer if answer is None else same(answer)].append(rollout)
    found = [(answers[those[0]], those) for those in ways.values()]
    return sorted(found, key=lambda vote: (vote[0] is None, -len(vote[1])))


def pick(rollouts: Rollouts, mode: str, task: Task) -> Tensor:
    """(P, 1) return of the rollout that `mode` chooses for each problem; no choice looks at returns."""
    k, chosen = rollouts.group_size, []
    for first in range(0, len(rollouts.messages), k):
        group = rollouts.messages[first : first + k]
        if mode == "vote":
            chosen.append(votes(task, [task.answer(messages) for messages in group])[0][1][0])
        else:  # the largest mean log-prob of a token, under the agents that wrote it
            logprobs = [[value for m in messages for value in m.logprobs] for messages in group]
            means = [sum(values) / max(len(values), 1) for values in logprobs]
            chosen.append(means.index(max(means)))
    return rollouts.grouped_returns.gather(1, torch.tensor(chosen)[:, None])


def rows(result: dict) -> Iterator[tuple[str, str]]:
    """(name, value with interval and, after ±, standard error over seeds) of avg@k, pass@1, ..., pass@k, and
    with partial credit of the same of returns. A mode that chooses one of k rollouts gives avg@k its name."""
    mode, k = result["mode"], result["k"]
    for key in (key for key in result if f"{key}_ci" in result):
        if result["partial"] or not key.startswith(("return", "best")):
            name = key.replace("_at_k", f"@{k}").replace("_at_", "@")
            name = name.replace("avg", mode) if mode in ("vote", "best_of") else name
            low, high = result[f"{key}_ci"]
            error = f" ±{result[f'{key}_se']:.3f}" if f"{key}_se" in result else ""
            yield name, f"{result[key]:.3f} [{low:.3f}, {high:.3f}]{error}"


def transcripts(rollouts: Rollouts, roles: list[str]) -> Iterator[str]:
    """The first rollout of three problems, one message a line."""
    for r in range(0, len(rollouts.messages), rollouts.group_size)[:3]:
        problem, value = rollouts.problems[r], rollouts.returns[r].item()
        verdict = {0.0: "wrong", 1.0: "right"}.get(value, f"return {value:.3g}")
        yield f"\n{problem.text}   (answer {problem.answer}; {verdict})"
        yield from (f"  {roles[m.agent]}: {m.text}" for m in rollouts.messages[r])


def samples(team: Team, rollouts: Rollouts) -> Iterator[dict]:
    """Every transcript for `--samples`. `prompts`: the text of the ids that each agent was given for its last
    message, which hold all that it was given before; None of an agent that took no turn."""
    state = getattr(team.task, "answer", lambda messages: None)
    for r, (problem, messages) in enumerate(zip(rollouts.problems, rollouts.messages)):
        prompts: list[str | None] = [None] * len(team.agents)
        last = {m.agent: t for t, m in enumerate(messages) if m.tokens}  # a tool is given no ids
        for j, t in last.items():
            ids = team.render(j, problem, messages[:t], add_generation_prompt=True).ids
            prompts[j] = team.agents[j].tokenizer.decode(ids, skip_special_tokens=False)
        written = [{"agent": m.agent, "text": m.text, "stopped": m.stopped} for m in messages]
        about = {"sample": r % rollouts.group_size, **vars(problem), "messages": written, "prompts": prompts}
        yield about | {"team_answer": state(messages), "return": rollouts.returns[r].item()}
