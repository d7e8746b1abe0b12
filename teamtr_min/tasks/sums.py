"""English word problems in several steps, made up here: what a real model can learn without any data."""

import re

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role

NAMES = "Ana Ben Carla Dan Ella Finn Grace Hugo Ida Jack Lena Max Nora Omar Rosa Tom".split()
THINGS = "apples books cards coins eggs keys lemons marbles pens roses shells stamps".split()
MORE = ("{name} buys {count} more.", "{name} finds {count} more.", "A friend brings {count} more.")
FEWER = ("{name} gives {count} away.", "{name} loses {count}.", "{name} sells {count}.")


class Sums:
    """ "Ana has 7 apples. A friend brings 6 more. Ana sells 4. How many apples does Ana have now?"

    With n turns a problem has n steps. Each message does one of them and nothing else: `7 + 6 = 13`, then
    `13 - 4 = 9`. The return is 1 if the last message ends with the answer, else 0. A hash of its numbers
    decides whether a problem is held out, as a tenth of them are: whatever the seed, no training problem has
    the numbers of a test problem, in any words.
    """

    name = "sums"
    most_turns = 6
    fields = ("question", "answer")
    system = "Do the next step of the problem. Write one sum."
    largest_start, largest_change, most = 12, 6, 15  # what there is to count stays between 1 and `most`

    def __init__(self, config: Config):
        if config.turns > self.most_turns:
            raise UserError(
                f"{self.name} has problems of at most {self.most_turns} steps, one per turn; the team would "
                f"have {config.turns} turns (agents x rounds)"
            )
        if config.data:
            raise UserError(f"{self.name} makes its own problems; --data goes with --task jsonl")
        self.agents, self.turns = config.agents, config.turns

    def roles(self, agents: int) -> list[Role]:
        return [Role(f"Agent {j + 1}", self.system) for j in range(agents)]

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        """`count` problems, from one side of the split, with replacement."""
        problems = []
        while len(problems) < count:
            numbers = self.numbers(generator)
            if self.is_held_out(numbers) == held_out:
                text = self.story(numbers, generator)
                problems.append(Problem(" ".join(map(str, numbers)), text, str(sum(numbers))))
        return problems

    def numbers(self, generator: Generator) -> list[int]:
        """What there is at first, then the change of each step."""
        numbers = [int(generator.integers(2, self.largest_start + 1))]
        while len(numbers) <= self.turns:
            change, sign = int(generator.integers(2, self.largest_change + 1)), generator.choice((1, -1))
            if 1 <= sum(numbers) + sign * change <= self.most:
                numbers.append(int(sign) * change)
        return numbers

    @staticmethod
    def is_held_out(numbers: list[int]) -> bool:
        return rng.key(0, "sums", *numbers) % 10 == 0

    @staticmethod
    def story(numbers: list[int], generator: Generator) -> str:
        name, thing = generator.choice(NAMES), generator.choice(THINGS)
        sentences = [f"{name} has {numbers[0]} {thing}."]
        for change in numbers[1:]:
            sentence = generator.choice(MORE if change > 0 else FEWER)
            sentences.append(sentence.format(name=name, count=abs(change)))
        return " ".join(sentences) + f" How many {thing} does {name} have now?"

    @staticmethod
    def steps(numbers: list[int]) -> list[str]:
        """`7 + 6 = 13`, `13 - 4 = 9`, ..."""
        lines, total = [], numbers[0]
        for change in numbers[1:]:
            lines.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}")
            total += change
        return lines

    def demonstrations(self, count: int, generator: Generator) -> list[Demonstration]:
        """`count` training problems with every step written right, for `--warm-start`."""
        problems = self.sample_problems(count, generator)
        return [Demonstration(p, self.steps([int(n) for n in p.id.split()])) for p in problems]

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        return float(self.answer(messages) == problem.answer)

    def answer(self, messages: list[Message]) -> str | None:
        """The number that the last message ends with."""
        found = re.match(r"\W*(\d+-?)", messages[-1].text[::-1])  # a search for the end would be quadratic
        return found and found[1][::-1]
