"""What a task is."""

import array
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from numpy.random import Generator


@dataclass(frozen=True)
class Role:
    name: str
    system: str
    tool: Callable | None = None  # (problem, messages) -> text, for an agent that is no language model


@dataclass(frozen=True)
class Message:
    agent: int
    tokens: list[int]  # as sampled; the last one is the end-of-message token exactly when `stopped`
    text: str
    logprobs: list[float]  # the sampler's own
    stopped: bool  # False: cut off at the length limit

    @property
    def content(self) -> list[int]:
        return [*self.tokens[:-1]] if self.stopped else [*self.tokens]

    def compact(self) -> "Message":
        """The same message, its numbers in arrays: 8 bytes a token where lists of them take 64 or more."""
        numbers = {"tokens": array.array("i", self.tokens), "logprobs": array.array("f", self.logprobs)}
        return dataclasses.replace(self, **numbers)

    def copy(self) -> "Message":
        """One that shares no list with this one, for code that may change it."""
        return dataclasses.replace(self, tokens=[*self.tokens], logprobs=[*self.logprobs])


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
