"""Floors: language models that must agree on how storeys are counted, with private views. [ours]"""

import itertools
import re

import numpy as np
from numpy.random import Generator

from teamtr_min.tasks.task import NAMES, Generated, Message, Problem, Role, habits

WHAT = "office studio flat kitchen workshop classroom library desk laboratory shop archive bakery".split()
STORY = (
    "{place} is {n} flights of stairs above the street.",
    "From the street {n} flights of stairs lead up to {place}.",
    "To reach {place} you climb {n} flights of stairs.",
)
COUNTING = "The ground floor is floor 0 in Europe and floor 1 in America. "


class Floors(Generated):
    """ "Ana's office is 3 flights of stairs above the street." -> `floor 3` or `floor 4` -> `3 flights`

    The first agent alone sees how many flights n there are, and writes on which floor that is: n as in Europe
    (code 0) or n + 1 as in America (code 1). Agents between hand a floor on, as it is (code 0) or one higher
    (code 1). The last one writes how many flights lead there: the number (code 0) or one less (code 1). The
    return is 1 if that is n, else 0: with two agents both must use the same code. Demonstrations begin with
    opposite habits. n is uniform, also given the other words of a problem and whether it is held out."""

    name = split = "floors"
    least_turns, most_rounds = 2, 1
    fewest, most = 2, 8  # flights: floors 2 to 9, of which only the two ends give a code away
    number = re.compile(r"\d+")

    def roles(self, agents: int) -> list[Role]:
        first = "You know how many flights of stairs lead to a place. Write its floor, such as: floor 5"
        between = "You hear the floor of a place. Write its floor for the next reader, such as: floor 5"
        last = "You hear the floor of a place. Write how many flights lead there, such as: 5 flights"
        tasks = [first, *[between] * (agents - 2), last]
        return [Role(f"Agent {j + 1}", COUNTING + text) for j, text in enumerate(tasks)]

    def draw(self, generator: Generator) -> str:
        place = f"{generator.choice(NAMES)}'s {generator.choice(WHAT)}"
        return generator.choice(STORY).format(place=place, n=generator.integers(self.fewest, self.most + 1))

    def problem(self, drawn: str, generator: Generator) -> Problem:
        return Problem(drawn, drawn, self.number.search(drawn)[0])

    def identity(self, text: str) -> list[str]:
        return [self.number.sub("", text)]

    def view(self, problem: Problem, agent: int) -> str:
        return problem.text if agent == 0 else self.number.sub("some", problem.text)

    def told(self, message: Message) -> int | None:
        """The number in a message; None unless there is exactly one."""
        numbers = self.number.findall(message.text)
        return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 9 else None

    def codes(self, problem: Problem, messages: list[Message]) -> list[int | None]:
        """The code of each message; None where it is in neither or follows a message without a number."""
        told = [int(problem.answer), *map(self.told, messages)]
        steps = [None if None in pair else pair[1] - pair[0] for pair in itertools.pairwise(told)]
        steps[-1] = steps[-1] and -steps[-1]
        return [step if step in (0, 1) else None for step in steps]

    def answer(self, messages: list[Message]) -> str | None:
        return None if (told := self.told(messages[-1])) is None else str(told)

    measure = habits

    def shown(self, problem: Problem, generator: Generator) -> list[str]:
        """Each agent draws code 1 with probability 0.3, the last one with 0.7."""
        code = generator.random(self.turns) < [0.3] * (self.turns - 1) + [0.7]
        floors = int(problem.answer) + np.cumsum(code[:-1])
        return [*(f"floor {floor}" for floor in floors), f"{floors[-1] - code[-1]} flights"]
