"""Relays: each message carries out one step of a calculation and hands over the rest. [ours]"""

import itertools
import re

from numpy.random import Generator

from teamtr_min.tasks.task import Generated, Message, Problem, habits


class Relay(Generated):
    """A chain such as `7+8*3-4`, worked out from left to right, modulo 10; with n turns it has n operations.
    Each message does the first and writes the rest: `5*3-4`, `5-4`, `1`. The return is 1 for the answer."""

    name = split = "relay"
    agent_names = "ABCDEFGH"
    system = (
        "You are one agent of a relay. The chain of digits is worked out from left to right, modulo 10. "
        "Carry out the first operation of the latest chain and write the whole rest, nothing else: "
        "7+8*3-4 becomes 5*3-4."
    )

    def draw(self, generator: Generator) -> str:
        digits = generator.integers(10, size=self.turns + 1)
        signs = generator.integers(3, size=self.turns)
        return str(digits[0]) + "".join("+-*"[s] + str(d) for s, d in zip(signs, digits[1:]))

    def problem(self, drawn: str, generator: Generator) -> Problem:
        return Problem(drawn, drawn, self.steps(drawn)[-1])

    @staticmethod
    def step(chain: str) -> str:
        """Carry out the first operation: `7+8*3-4` -> `5*3-4`."""
        a, sign, b, rest = int(chain[0]), chain[1], int(chain[2]), chain[3:]
        return str({"+": a + b, "-": a - b, "*": a * b}[sign] % 10) + rest

    def steps(self, chain: str) -> list[str]:
        return [chain := self.step(chain) for _ in range(self.turns)]

    def shown(self, problem: Problem, generator: Generator) -> list[str]:
        return self.steps(problem.text)

    def answer(self, messages: list[Message]) -> str:
        return messages[-1].text.strip()


class Convention(Relay):
    """Sums modulo 4, such as `2+3+1`, handed over in one of two codes.

    In code 0 the first digit of a message is the value; in code 1 it is 3 minus the value. `2+3+1` becomes
    `1+1` or `2+1`, and a reader may take either for 1 or for 2. The problem and the last message are plain.
    The return is the share of handovers whose writer and reader use the same code; where all do, the team
    reaches the answer. Every digit is as likely in either code, so a message shows its code only to a reader
    who also works out the problem. Of digits handed on all but the last are odd: even ones hide the code."""

    name = "convention"
    least_turns, most_turns = 2, 4  # a writer and a reader at least
    starting_habits = 0.7, 0.3  # P(code 1) of the shipped model at even and odd turns
    system = (
        "You are one agent of a relay. The sum is worked out from left to right, modulo 4. Carry out the "
        "first addition of the latest sum and write the whole rest, nothing else. The first digit of a "
        "message may stand for itself or for 3 minus itself: agree on one code with the others, without "
        "a word about it. The problem and the last message are plain."
    )

    def draw(self, generator: Generator) -> str:
        digits = generator.integers(4, size=self.turns + 1)
        digits[2:-1] |= 1
        return "+".join(map(str, digits))

    @classmethod
    def step(cls, chain: str, turn: int = 0, code: int = 0) -> str:
        """Carry out the first addition at turn `turn`, reading and writing in `code`."""
        a, b, rest = int(chain[0]), int(chain[2]), chain[3:]
        a = 3 - a if code and turn else a  # the problem is plain
        total = (a + b) % 4
        return str(3 - total if code and rest else total) + rest  # the last message is plain

    def codes(self, problem: Problem, messages: list[Message]) -> list[int | None]:
        """The code of each message; None where it does not carry out a step on the message before."""
        codes, chain = [], problem.text
        for turn, message in enumerate(messages):
            legal = re.fullmatch(r"[0-3](\+[0-3])+", chain)
            steps = [self.step(chain, turn, code) for code in (0, 1)] if legal else []
            chain = message.text.strip()
            codes.append(steps.index(chain) if steps.count(chain) == 1 else None)
        return codes

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        handovers = list(itertools.pairwise(self.codes(problem, messages)))
        return sum(a is not None and a == b for a, b in handovers) / len(handovers)

    measure = habits
