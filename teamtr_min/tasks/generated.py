"""What the tasks that make their own problems have in common."""

from collections.abc import Sequence

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role, Task

NAMES = "Ana Ben Carla Dan Ella Finn Grace Hugo Ida Jack Lena Max Nora Omar Rosa Tom".split()


class Generated(Task):
    """Problems without end, of which a hash holds out a tenth: the same ones for every seed. A subclass has
    `draw(generator)`, a text that tells a problem, `problem(drawn, generator)`, the Problem of that text,
    `answer(messages)`, and `shown(problem, generator)`, the messages of a demonstration."""

    name: str
    split: str  # names the hash
    system: str
    version = 1  # counts up when the same seed gives other problems or other returns
    fields: tuple[str, str] | None = "problem", "answer"  # None: the task reads --data itself
    grader = "exact"
    least_turns, most_turns = 1, 8
    takes_tools = False  # whether its grade reads messages such that those of --tools do no harm
    agent_names: Sequence[str] = [f"Agent {j}" for j in range(1, 9)]

    def __init__(self, config: Config):
        if not self.least_turns <= config.turns <= self.most_turns:
            limits = f"{self.name} takes {self.least_turns} to {self.most_turns} turns"
            raise UserError(f"{limits}; agents x rounds would give {config.turns}")
        if config.data and self.fields:
            raise UserError(f"{self.name} makes its own problems; --data goes with --task jsonl")
        if config.tools and not self.takes_tools:
            raise UserError(f"{self.name} has no use for tools; leave them out, or give --tools ''")
        self.agents, self.turns, self.tools = config.agents, config.turns, config.tools

    def roles(self, agents: int) -> list[Role]:
        return [Role(name, self.system) for name in self.agent_names[:agents]]

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        problems = []
        while len(problems) < count:
            if self.is_held_out(drawn := self.draw(generator)) == held_out:
                problems.append(self.problem(drawn, generator))
        return problems

    def identity(self, text: str) -> Sequence:
        return [text]  # problems with equal ones are on the same side of the split

    def is_held_out(self, text: str) -> bool:
        return rng.key(0, self.split, *self.identity(text)) % 10 == 0

    def demonstrations(self, count: int, generator: Generator) -> list[Demonstration]:
        problems = self.sample_problems(count, generator)
        return [Demonstration(problem, self.shown(problem, generator)) for problem in problems]

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        return float(self.answer(messages) == problem.answer)

    def fingerprint(self) -> dict[str, str]:
        return {"task": f"{self.name}, version {self.version}"}


def habits(task, problems: list[Problem], messages: list[list[Message]]) -> dict:
    """`habits`: each agent's share of messages in code 1, of those in either code (`task.codes`), or None."""
    seen = [[] for _ in range(task.agents)]
    for problem, transcript in zip(problems, messages):
        for message, code in zip(transcript, task.codes(problem, transcript)):
            if code is not None:
                seen[message.agent].append(code)
    return {"habits": [sum(codes) / len(codes) if codes else None for codes in seen]}
