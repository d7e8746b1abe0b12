"""Relay arithmetic: each message carries out one step of a calculation and hands over the rest."""

from numpy.random import Generator

from teamtr_min.engine import rng
from teamtr_min.tasks.generated import Generated
from teamtr_min.tasks.task import Message, Problem, Role


class Relay(Generated):
    """A chain such as `7+8*3-4`, worked out from left to right, modulo 10.

    With n turns a chain has n operations. Each message carries out the first one and writes the rest:
    `5*3-4`, `5-4`, `1`. The return is 1 if the last message is the answer, else 0.
    """

    name = "relay"
    modulus = 10
    agent_names = "ABCDEFGH"
    system = (
        "You are one agent of a relay. The chain of digits is worked out from left to right, modulo 10. "
        "Carry out the first operation of the latest chain and write the whole rest, nothing else: "
        "7+8*3-4 becomes 5*3-4."
    )

    def roles(self, agents: int) -> list[Role]:
        return [Role(name, self.system) for name in self.agent_names[:agents]]

    def draw(self, generator: Generator) -> str:
        digits = generator.integers(10, size=self.turns + 1)
        signs = generator.integers(3, size=self.turns)
        return str(digits[0]) + "".join("+-*"[s] + str(d) for s, d in zip(signs, digits[1:]))

    def problem(self, drawn: str, generator: Generator) -> Problem:
        return Problem(drawn, drawn, self.solve(drawn))

    @staticmethod
    def is_held_out(text: str) -> bool:
        return rng.key(0, "relay", text) % 10 == 0

    @classmethod
    def step(cls, chain: str) -> str:
        """Carry out the first operation: `7+8*3-4` -> `5*3-4`."""
        a, sign, b, rest = int(chain[0]), chain[1], int(chain[2]), chain[3:]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        return str(value % cls.modulus) + rest

    @classmethod
    def solve(cls, chain: str) -> str:
        return cls.solve(cls.step(chain)) if len(chain) > 1 else chain

    def shown(self, problem: Problem, generator: Generator) -> list[str]:
        """Every step carried out right."""
        chains = [problem.text]
        while len(chains) <= self.turns:
            chains.append(self.step(chains[-1]))
        return chains[1:]

    def answer(self, messages: list[Message]) -> str:
        return messages[-1].text.strip()
