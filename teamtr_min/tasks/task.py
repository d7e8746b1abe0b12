"""What a task is: problems, roles, messages, and a return for each rollout."""

from collections.abc import Callable
from dataclasses import dataclass


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
