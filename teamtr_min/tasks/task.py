"""What a task is."""

from dataclasses import dataclass
from typing import Protocol

from numpy.random import Generator

from teamtr_min.team import Message, Role


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    answer: str


@dataclass(frozen=True)
class Demonstration:
    """A rollout to imitate: its messages, and the agent that writes each (None: the agents in turn)."""

    problem: Problem
    messages: list[str]
    agents: list[int] | None = None


class Task(Protocol):
    """Any object with these three methods. It may also have

    answer(messages) -> str | None         the team's answer, which `eval.py --mode vote` counts
    measure(problems, messages) -> dict    more to log about the rollouts of an update
    demonstrations(count, generator)       a list of `count` Demonstrations to begin with, `--warm-start`
    fields                                 question and answer field of a file given to `eval.py --data`
    """

    def roles(self, agents: int) -> list[Role]:
        """One role per agent."""

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        """`count` problems to train on, or held-out ones. All randomness comes from `generator`."""

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        """The return of a rollout, in [0, 1]."""
