"""Problems, roles and verifiers. Whatever offers what `Relay` offers is a task."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teamtr_min import rng
from teamtr_min.config import UserError
from teamtr_min.team import Message, Role


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    answer: str


class Relay:
    """Relay arithmetic: a chain such as `7+8*3-4`, worked out from left to right, modulo 10, one step per
    message.

    With n turns a chain has n operations. Each message carries out the first one and writes the rest:
    `5*3-4`, `5-4`, `1`. The return is 1 if the last message is the answer, else 0. A tenth of all chains is
    held out: a hash of the text decides, so no training problem is ever a test problem, whatever the seed.
    """

    name = "relay"
    most_turns = 8  # the shipped model was shown chains of 1 to 8 operations

    def __init__(self, turns: int):
        if turns > self.most_turns:
            raise UserError(
                f"relay has chains of at most {self.most_turns} operations, one per turn; "
                f"{turns} turns (agents x rounds) are too many"
            )
        self.turns = turns

    def roles(self, agents: int) -> list[Role]:
        system = (
            "You are one agent of a relay. The chain of digits is worked out from left to right, modulo 10. "
            "Carry out the first operation of the latest chain and write the whole rest, nothing else: "
            "7+8*3-4 becomes 5*3-4."
        )
        return [Role("ABCDEFGH"[j], system) for j in range(agents)]

    def draw(self, count: int, generator: np.random.Generator, held_out: bool = False) -> list[Problem]:
        """`count` problems, uniform over one side of the split, with replacement."""
        problems = []
        while len(problems) < count:
            digits, signs = (
                generator.integers(10, size=self.turns + 1),
                generator.integers(3, size=self.turns),
            )
            chain = str(digits[0]) + "".join("+-*"[s] + str(d) for s, d in zip(signs, digits[1:]))
            if self.is_held_out(chain) == held_out:
                problems.append(Problem(chain, chain, self.solve(chain)))
        return problems

    @staticmethod
    def is_held_out(chain: str) -> bool:
        return rng.key(0, "relay", chain) % 10 == 0

    @staticmethod
    def step(chain: str) -> str:
        """Carry out the first operation: `7+8*3-4` -> `5*3-4`."""
        a, sign, b, rest = int(chain[0]), chain[1], int(chain[2]), chain[3:]
        return str((a + b if sign == "+" else a - b if sign == "-" else a * b) % 10) + rest

    @classmethod
    def solve(cls, chain: str) -> str:
        while len(chain) > 1:
            chain = cls.step(chain)
        return chain

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        """The return of a finished rollout, in [0, 1]."""
        return float(messages[-1].text.strip() == problem.answer)

    def answer(self, messages: list[Message]) -> str:
        """What the team finally said."""
        return messages[-1].text.strip()


def load_task(name: str, turns: int) -> Relay:
    if name != "relay":
        raise UserError(f"no task {name!r}; there is: relay")
    return Relay(turns)


def read_problems(path: str | Path) -> list[Problem]:
    """Problems from a JSONL file of {"problem", "answer"} and optionally "id"; errors name the line."""
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, answer = record["problem"], record["answer"]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        except (KeyError, TypeError):
            raise UserError(f'{path}, line {number}: needs the fields "problem" and "answer"') from None
        problems.append(Problem(str(record.get("id", number)), str(text), str(answer)))
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems
