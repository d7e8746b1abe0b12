"""What a team works on. `--task` names an entry of TASKS, or a user's file with a function `task(config)`."""

import reprlib

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.files import UserError, function_from_file
from teamtr_min.tasks.answers import extract_answer, is_correct
from teamtr_min.tasks.datasets import DATASETS
from teamtr_min.tasks.floors import Floors
from teamtr_min.tasks.relay import Convention, Relay
from teamtr_min.tasks.sums import Sums
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role, Task
from teamtr_min.tasks.word_problems import WordProblems, read_problems

__all__ = [
    "Convention", "Demonstration", "Floors", "Message", "Problem", "Relay", "Role", "Sums", "TASKS", "Task",
    "WordProblems", "extract_answer", "is_correct", "load_task", "read_problems",
]  # fmt: skip

TASKS = {"relay": Relay, "convention": Convention, "sums": Sums, "floors": Floors}
TASKS |= dict.fromkeys([*DATASETS, "jsonl"], WordProblems)


def load_task(config: Config, training: bool = False) -> Task:
    """The task that `config.task` names, to train on or, for all there are, to evaluate."""
    if training and DATASETS.get(config.task, [""])[0] is None:
        advice = f"train on math, then `python eval.py {config.task} --team runs/NAME`"
        raise UserError(f"{config.task} is there to evaluate on: {advice}")
    if config.task in TASKS:
        return TASKS[config.task](config)
    if not config.task.endswith(".py"):
        raise UserError(f"no task {config.task!r}: give {', '.join(TASKS)}, or FILE.py with `task`")
    task = function_from_file(config.task, "task")(config)
    missing = [name for name in ("roles", "sample_problems", "grade") if not hasattr(task, name)]
    if missing:
        raise UserError(f"{config.task}: its task has no {', '.join(missing)}")
    return UserTask(task, config.task)


class UserTask:
    """A task from a user's file, with the defaults of Task. What its methods return is checked here."""

    def __init__(self, task, path: str):
        self._task, self._path = task, path

    def __getattr__(self, name: str):
        return getattr(self._task if hasattr(self._task, name) else Task(), name)

    def _check(self, method: str, wanted: str, right: bool, returned) -> None:
        if not right:
            got = reprlib.repr(returned)
            raise UserError(f"{self._path}: `{method}` must return {wanted}, but returned {got}")

    def roles(self, agents: int) -> list[Role]:
        roles = self._task.roles(agents)
        right = isinstance(roles, list) and len(roles) == agents and all(isinstance(r, Role) for r in roles)
        self._check("roles", f"a list of {agents} Roles, one per agent", right, roles)
        return roles

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        problems = self._task.sample_problems(count, generator, held_out=held_out)
        right = isinstance(problems, list) and all(isinstance(p, Problem) for p in problems)
        right = right and (1 if held_out else count) <= len(problems) <= count
        self._check("sample_problems", f"a list of {count} Problems", right, problems)
        return problems

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        value = self._task.grade(problem, messages)
        right = not isinstance(value, str) and hasattr(value, "__float__") and 0 <= float(value) <= 1
        self._check("grade", "a number from 0 to 1", right, value)
        return float(value)
