"""Floors: language models that must agree on how storeys are counted, with private views. [ours]"""

import re

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.tasks.generated import Generated, habits
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role

WHOSE = "Ana Ben Carla Dan Ella Finn Grace Hugo Ida Jack Lena Max Nora Omar Rosa Tom".split()
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
    (code 0) or n + 1 as in America (code 1). The last agent sees only a floor, and writes how many flights
    lead there: it copies the number (code 0) or subtracts one (code 1). Agents between these hand a floor on:
    as it is (code 0) or one higher, from European to American (code 1). The return is 1 if the last message
    tells n, else 0: with two agents both must use the same code. Demonstrations begin with opposite habits.

    The hash that holds problems out leaves out n, and n is drawn uniformly. So the words of a problem, which
    all agents see, say nothing about n.
    """

    name = "floors"
    least_turns = 2
    fewest, most = 2, 8  # flights: floors 2 to 9, of which only the two ends give a code away
    starting_habits = 0.3, 0.7  # P(code 1) in demonstrations: of all agents but the last, and of the last
    number = re.compile(r"\d+")

    def __init__(self, config: Config):
        super().__init__(config)
        if config.rounds > 1:
            raise UserError("floors takes one turn per agent: leave out --rounds")

    def roles(self, agents: int) -> list[Role]:
        first = "You know how many flights of stairs lead to a place. Write its floor, such as: floor 5"
        between = "You hear the floor of a place. Write its floor for the next reader, such as: floor 5"
        last = "You hear the floor of a place. Write how many flights lead there, such as: 5 flights"
        tasks = [first, *[between] * (agents - 2), last]
        return [Role(f"Agent {j + 1}", COUNTING + text) for j, text in enumerate(tasks)]

    def draw(self, generator: Generator) -> str:
        place = f"{generator.choice(WHOSE)}'s {generator.choice(WHAT)}"
        return generator.choice(STORY).format(place=place, n=generator.integers(self.fewest, self.most + 1))

    def problem(self, drawn: str, generator: Generator) -> Problem:
        return Problem(drawn, drawn, self.number.search(drawn)[0])

    def is_held_out(self, text: str) -> bool:
        return rng.key(0, "floors", self.number.sub("", text)) % 10 == 0

    def view(self, problem: Problem, agent: int) -> str:
        """The whole story for the first agent, the same words without the number for the others."""
        return problem.text if agent == 0 else self.number.sub("some", problem.text)

    def told(self, message: Message) -> int | None:
        """The number in a message; None unless there is exactly one."""
        numbers = self.number.findall(message.text)
        return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 9 else None

    def codes(self, problem: Problem, messages: list[Message]) -> list[int | None]:
        """The code of each message; None where it is in neither or follows a message without a number."""
        codes, heard = [], int(problem.answer)
        for turn, message in enumerate(messages):
            told, code = self.told(message), None
            if told is not None and heard is not None:
                code = heard - told if turn == len(messages) - 1 else told - heard
            codes.append(code if code in (0, 1) else None)
            heard = told
        return codes

    def answer(self, messages: list[Message]) -> str | None:
        told = self.told(messages[-1])
        return None if told is None else str(told)

    measure = habits

    def demonstrations(self, count: int, generator: Generator) -> list[Demonstration]:
        """`count` training problems in which each agent draws a code by its starting habit."""
        shown = []
        for problem in self.sample_problems(count, generator):
            floor, lines = int(problem.answer), []
            for turn in range(self.turns):
                last = turn == self.turns - 1
                code = int(generator.random() < self.starting_habits[last])
                floor += -code if last else code
                lines.append(f"{floor} flights" if last else f"floor {floor}")
            shown.append(Demonstration(problem, lines))
        return shown
