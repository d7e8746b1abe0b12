"""What a task is: problems, roles, messages, and a return for each rollout. What tasks that make their own
problems have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError

NAMES = "Ana Ben Carla Dan Ella Finn Grace Hugo Ida Jack Lena Max Nora Omar Rosa Tom".split()


@dataclass(frozen=True)
class Message:
    agent: int
    tokens: list[int]  # as sampled; the last one is an end-of-message token exactly when `stopped`
    text: str
    logprobs: list[float]  # the sampler's own
    stopped: bool  # False: cut off at the length limit

    @property
    def content(self) -> list[int]:
        return self.tokens[:-1] if self.stopped else self.tokens[:]  # without the end-of-message token


@dataclass(frozen=True)
class Problem:
    id: str  # of problems from a file: its name and the line, as messages show it
    text: str
    answer: str


@dataclass(frozen=True)
class Role:
    name: str
    system: str
    tool: Callable | None = None  # (problem, messages) -> text: the messages of an agent without a model


@dataclass(frozen=True)
class Demonstration:
    problem: Problem
    messages: list[str]
    agents: list[int] | None = None  # who writes each message; None: the agents in turn
    stopped: list[bool] | None = None  # whether each ends, or was cut off; None: all end


class Task:
    """A task has the first three of these methods, may have the others, and inherits the defaults below.

    roles(agents)                          a list of one Role per agent
    sample_problems(count, generator, held_out=False)   `count` Problems, of held-out ones at most `count`
    grade(problem, messages) -> float      the return of a rollout, in [0, 1]
    answer(messages) -> str | None         the team's answer, which `eval.py --mode vote` counts
    same(answer) -> str                    one text for all ways to write an answer, which it counts
    measure(problems, messages) -> dict    more to log about the rollouts of an update
    demonstrations(count, generator)       a list of `count` Demonstrations, for `--warm-start`
    all_problems()                         a list of all Problems that a run can draw, if it is finite
    leave_out(ids, why)                    draw these problems no more, and say so in `notes`
    fields                                 question and answer field of a file for `eval.py --data`
    grader                                 the name of what decides whether an answer is right"""

    notes: list[str] = []  # sentences about the data that a run prints before it starts

    def view(self, problem: Problem, agent: int) -> str:
        return problem.text  # as this agent sees it (a private view) [ours]

    def is_held_out(self, text: str) -> bool:
        return False  # True: no demonstration may show the problem with this text

    def fingerprint(self) -> dict[str, str]:
        return {}  # everything but the flags that results rest on, by name: a resumed run must find the same


class Generated(Task):
    """Problems without end, of which a hash holds out a tenth: the same ones for every seed. A subclass has
    `draw(generator)`, a text that tells a problem, `problem(drawn, generator)`, the Problem of that text,
    `answer(messages)`, and `shown(problem, generator)`, the messages of a demonstration."""

    name: str
    split: str  # names the hash
    system: str
    version = 1  # counts up when the same seed gives other problems or other returns
    fields: tuple[str, str] | None = "problem", "answer"  # None: the task reads --data itself
    grader = "exact"
    least_turns, most_turns, most_rounds = 1, 8, 8
    takes_tools = False  # whether its grade reads messages such that those of --tools do no harm
    agent_names: Sequence[str] = [f"Agent {j}" for j in range(1, 9)]

    def __init__(self, config: Config):
        if not self.least_turns <= config.turns <= self.most_turns:
            limits = f"{self.name} takes {self.least_turns} to {self.most_turns} turns"
            raise UserError(f"{limits}; agents x rounds would give {config.turns}")
        if config.rounds > self.most_rounds:
            raise UserError(f"{self.name} takes one turn per agent: leave out --rounds")
        if config.data and self.fields:
            raise UserError(f"{self.name} makes its own problems; --data goes with --task jsonl")
        if config.tools and not self.takes_tools:
            raise UserError(f"{self.name} has no use for tools; leave them out, or give --tools ''")
        self.agents, self.turns, self.tools = config.agents, config.turns, config.tools

    def roles(self, agents: int) -> list[Role]:
        return [Role(name, self.system) for name in self.agent_names[:agents]]

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        problems = []
        while len(problems) < count:
            if self.is_held_out(drawn := self.draw(generator)) == held_out:
                problems.append(self.problem(drawn, generator))
        return problems

    def identity(self, text: str) -> Sequence:
        return [text]  # problems with equal ones are on the same side of the split

    def is_held_out(self, text: str) -> bool:
        return rng.key(0, self.split, *self.identity(text)) % 10 == 0

    def demonstrations(self, count: int, generator: Generator) -> list[Demonstration]:
        problems = self.sample_problems(count, generator)
        return [Demonstration(problem, self.shown(problem, generator)) for problem in problems]

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        return float(self.answer(messages) == problem.answer)

    def fingerprint(self) -> dict[str, str]:
        return {"task": f"{self.name}, version {self.version}"}


def habits(task, problems: list[Problem], messages: list[list[Message]]) -> dict:
    """`habits`: each agent's share of messages in code 1, of those in either code (`task.codes`), or None."""
    seen = [[] for _ in range(task.agents)]
    for problem, transcript in zip(problems, messages):
        for message, code in zip(transcript, task.codes(problem, transcript)):
            if code is not None:
                seen[message.agent].append(code)
    return {"habits": [sum(codes) / len(codes) if codes else None for codes in seen]}
