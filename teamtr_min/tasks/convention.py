"""The hidden convention: a relay whose agents must come to agree on a code. [ours]"""

import itertools
import re

from numpy.random import Generator

from teamtr_min.tasks.generated import habits
from teamtr_min.tasks.relay import Relay
from teamtr_min.tasks.task import Message, Problem


class Convention(Relay):
    """Sums modulo 4, such as `2+3+1`, handed over in one of two codes.

    In code 0 the first digit of a message is the value; in code 1 it is 3 minus the value. `2+3+1` becomes
    `1+1` or `2+1`, and a reader may take either for 1 or for 2. Each agent reads and writes in one code. The
    problem and the last message are plain. A team reaches the answer if all its agents use code 0, or all
    code 1. The return is the share of handovers whose writer and reader use the same code.

    Every digit is as likely in either code, so a message shows its code only to a reader who also works out
    the problem. All digits of a problem but the first two and the last are odd: with an even digit both codes
    would write the same message.
    """

    name = "convention"
    modulus = 4
    least_turns, most_turns = 2, 4  # a writer and a reader at least
    legal = re.compile(r"[0-3]([+][0-3])+")
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
        reads, writes = turn > 0, len(chain) > 3  # the problem and the last message are plain
        chain = super().step(cls.in_code(chain, code if reads else 0))
        return cls.in_code(chain, code if writes else 0)

    @classmethod
    def in_code(cls, chain: str, code: int) -> str:
        """The chain with its first digit in this code. Each code is its own inverse."""
        return str(cls.modulus - 1 - int(chain[0])) + chain[1:] if code else chain

    def codes(self, problem: Problem, messages: list[Message]) -> list[int | None]:
        """The code of each message; None where it does not carry out a step on the message before."""
        codes, chain = [], problem.text
        for turn, message in enumerate(messages):
            legal = self.legal.fullmatch(chain)
            steps = [self.step(chain, turn, code) for code in (0, 1)] if legal else []
            chain = message.text.strip()
            codes.append(steps.index(chain) if steps.count(chain) == 1 else None)
        return codes

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        handovers = list(itertools.pairwise(self.codes(problem, messages)))
        return sum(a is not None and a == b for a, b in handovers) / len(handovers)

    measure = habits
