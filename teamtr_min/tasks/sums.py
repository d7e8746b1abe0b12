"""English word problems in several steps, made up here: a real model can learn them without any data."""

import re

from numpy.random import Generator

from teamtr_min.tasks.task import NAMES, Generated, Message, Problem

THINGS = "apples books cards coins eggs keys lemons marbles pens roses shells stamps".split()
MORE = ("{name} buys {count} more.", "{name} finds {count} more.", "A friend brings {count} more.")
FEWER = ("{name} gives {count} away.", "{name} loses {count}.", "{name} sells {count}.")


class Sums(Generated):
    """ "Ana has 7 apples. A friend brings 6 more. Ana sells 4. How many apples does Ana have now?"

    With n turns a problem has n steps. Each message does one of them alone: `7 + 6 = 13`, then `13 - 4 = 9`.
    The return is 1 if the last message ends with the answer, else 0. With a calculator an agent writes
    `<<7+6>>`, and the last message may be its. No training problem has the numbers of a held-out one."""

    name = split = "sums"
    version, most_turns = 2, 6
    takes_tools = True
    first, change, largest = (2, 13), (2, 7), 15  # bounds of the numbers: from, below; the largest count
    fields = ("question", "answer")
    system = "Do the next step of the problem. Write one sum."

    def draw(self, generator: Generator) -> str:
        """The count at first, then the change of each step, such as " 7 6 -4"."""
        numbers = [int(generator.integers(*self.first))]
        while len(numbers) <= self.turns:
            change = int(generator.integers(*self.change)) * int(generator.choice((1, -1)))
            if 1 <= sum(numbers) + change <= self.largest:
                numbers.append(change)
        return "".join(f" {number}" for number in numbers)

    def problem(self, drawn: str, generator: Generator) -> Problem:
        first, *changes = self.identity(drawn)
        name, thing = generator.choice(NAMES), generator.choice(THINGS)
        text = f"{name} has {first} {thing}."
        for change in changes:
            sentence = generator.choice(MORE if change > 0 else FEWER)
            text += " " + sentence.format(name=name, count=abs(change))
        text += f" How many {thing} does {name} have now?"
        return Problem(drawn.strip(), text, str(first + sum(changes)))

    def identity(self, text: str) -> list[int]:
        """The numbers of a problem, from its words or from what was drawn."""
        told = re.findall(r"(gives|loses|sells)? (-?\d+)\b", text)
        return [-int(number) if fewer else int(number) for fewer, number in told]

    def shown(self, problem: Problem, generator: Generator) -> list[str]:
        (total, *changes), lines = self.identity(problem.text), []
        for change in changes:
            sign, before, total = "+" if change > 0 else "-", total, total + change
            form = "<<{}{}{}>>" if "calculator" in self.tools else "{} {} {} = {}"
            lines.append(form.format(before, sign, abs(change), total))
        return lines

    def answer(self, messages: list[Message]) -> str | None:
        """The number that the last message ends with."""
        text = messages[-1].text[::-1]  # a search for the end would be quadratic
        found = re.match(r"\W*(\d++-?)(?![.,]\d)", text)
        return found and found[1][::-1]


class LargeSums(Sums):  # with numbers to 99
    name = split = "sums-99"
    first, change, largest = (10, 90), (10, 60), 99
