"""What a team works on. `--task` names an entry of TASKS, or a user's file with a function `task(config)`."""

import dataclasses
import reprlib

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.files import UserError, function_from_file
from teamtr_min.tasks.answers import extract_answer, is_correct
from teamtr_min.tasks.floors import Floors
from teamtr_min.tasks.relay import Convention, Relay
from teamtr_min.tasks.sums import LargeSums, Sums
from teamtr_min.tasks.task import Demonstration, Message, Problem, Role, Task
from teamtr_min.tasks.word_problems import DATASETS, WordProblems, read_problems
from teamtr_min.tasks.zebra import SIZES, Zebra

__all__ = [
    "Convention", "Demonstration", "Floors", "Message", "Problem", "Relay", "Role", "Sums", "TASKS", "Task",
    "WordProblems", "extract_answer", "is_correct", "load_task", "read_problems",
]  # fmt: skip

TASKS = {"relay": Relay, "convention": Convention, "sums": Sums, "sums-99": LargeSums, "floors": Floors}
TASKS |= {"zebra": Zebra, **dict.fromkeys([*DATASETS, "jsonl"], WordProblems)}
LISTED = ", ".join(TASKS).replace("zebra", "zebra, zebra-2x2 to zebra-6x6")
TASKS |= {f"zebra-{size}": Zebra for size in SIZES}


def load_task(config: Config) -> Task:
    if config.task in TASKS:
        return TASKS[config.task](config)
    if not config.task.endswith(".py"):
        raise UserError(f"no task {config.task!r}: give {LISTED}, or FILE.py with `task`")
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

    def roles(self, agents: int) -> list[Role]:
        return self._list_of(Role, agents, agents, "roles", self._task.roles(agents))

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        problems = self._task.sample_problems(count, generator, held_out=held_out)
        return self._list_of(Problem, 1 if held_out else count, count, "sample_problems", problems)

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        value = self._task.grade(problem, messages)
        try:
            number = -1.0 if isinstance(value, str) else float(value)
        except (TypeError, ValueError):  # a list, or an array
            number = -1.0
        if not 0 <= number <= 1:
            raise self._fault("grade", "a number from 0 to 1", value)
        return number

    def _list_of(self, kind: type, least: int, most: int, method: str, value) -> list:
        texts = [f.name for f in dataclasses.fields(kind) if f.type is str]
        right = isinstance(value, list) and all(isinstance(item, kind) for item in value)
        right = right and all(isinstance(getattr(item, name), str) for item in value for name in texts)
        if not right or not least <= len(value) <= most:
            raise self._fault(method, f"a list of {most} {kind.__name__}s", value)
        return value

    def _fault(self, method: str, wanted: str, value) -> UserError:
        return UserError(f"{self._path}: `{method}` must return {wanted}, but returned {reprlib.repr(value)}")
