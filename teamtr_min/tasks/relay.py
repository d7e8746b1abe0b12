"""Relay arithmetic: every message carries out one step of a calculation and hands over the rest."""

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role


class Relay:
    """A chain such as `7+8*3-4`, worked out from left to right, modulo 10.

    With n turns a chain has n operations. Each message carries out the first one and writes the rest:
    `5*3-4`, `5-4`, `1`. The return is 1 if the last message is the answer, else 0. A hash of its text decides
    whether a chain is held out, as a tenth of them are: no training problem is a test problem for any seed.
    """

    name = "relay"
    modulus = 10
    least_turns, most_turns = 1, 8  # the lengths of chain that the shipped model was trained on
    agent_names = "ABCDEFGH"
    fields = ("problem", "answer")
    system = (
        "You are one agent of a relay. The chain of digits is worked out from left to right, modulo 10. "
        "Carry out the first operation of the latest chain and write the whole rest, nothing else: "
        "7+8*3-4 becomes 5*3-4."
    )

    def __init__(self, config: Config):
        if not self.least_turns <= config.turns <= self.most_turns:
            raise UserError(
                f"{self.name} has chains of at least {self.least_turns} and at most {self.most_turns} "
                f"operations, one per turn; the team would have {config.turns} turns (agents x rounds)"
            )
        if config.data:
            raise UserError(f"{self.name} makes its own problems; --data goes with --task jsonl")
        self.agents, self.turns = config.agents, config.turns

    def roles(self, agents: int) -> list[Role]:
        return [Role(name, self.system) for name in self.agent_names[:agents]]

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        """`count` problems, uniform over one side of the split, with replacement."""
        problems = []
        while len(problems) < count:
            chain = self.chain(generator)
            if self.is_held_out(chain) == held_out:
                problems.append(Problem(chain, chain, self.solve(chain)))
        return problems

    def chain(self, generator: Generator) -> str:
        digits = generator.integers(10, size=self.turns + 1)
        signs = generator.integers(3, size=self.turns)
        return str(digits[0]) + "".join("+-*"[s] + str(d) for s, d in zip(signs, digits[1:]))

    @staticmethod
    def is_held_out(chain: str) -> bool:
        return rng.key(0, "relay", chain) % 10 == 0

    @classmethod
    def step(cls, chain: str) -> str:
        """Carry out the first operation: `7+8*3-4` -> `5*3-4`."""
        a, sign, b, rest = int(chain[0]), chain[1], int(chain[2]), chain[3:]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        return str(value % cls.modulus) + rest

    @classmethod
    def solve(cls, chain: str) -> str:
        while len(chain) > 1:
            chain = cls.step(chain)
        return chain

    def demonstrations(self, count: int, generator: Generator) -> list[Demonstration]:
        """`count` training problems with every step carried out right."""
        shown = []
        for problem in self.sample_problems(count, generator):
            chains = [problem.text]
            while len(chains) <= self.turns:
                chains.append(self.step(chains[-1]))
            shown.append(Demonstration(problem, chains[1:]))
        return shown

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        return float(self.answer(messages) == problem.answer)

    def answer(self, messages: list[Message]) -> str:
        return messages[-1].text.strip()
