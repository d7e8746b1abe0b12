"""What a team works on: one file a task.

`--task` names an entry of TASKS, or a Python file whose function `task(config)` returns a Task of one's own.
"""

import dataclasses

from teamtr_min.config import Config
from teamtr_min.files import UserError, function_from_file
from teamtr_min.tasks.answers import extract_answer, is_correct, number
from teamtr_min.tasks.convention import Convention
from teamtr_min.tasks.datasets import DATASETS
from teamtr_min.tasks.guard import Guarded
from teamtr_min.tasks.relay import Relay
from teamtr_min.tasks.sums import Sums
from teamtr_min.tasks.task import Demonstration, Problem, Task
from teamtr_min.tasks.word_problems import WordProblems, read_problems

__all__ = [
    "Convention", "Demonstration", "Problem", "Relay", "Sums", "TASKS", "Task", "WordProblems",
    "extract_answer", "is_correct", "load_task", "number", "read_problems",
]  # fmt: skip

TASKS = {
    "relay": Relay,
    "convention": Convention,
    "sums": Sums,
    **dict.fromkeys(DATASETS, WordProblems),
    "jsonl": WordProblems,
}


def load_task(config: Config, training: bool = False) -> Task:
    """The task that `config.task` names, to train on or, for all there are, to evaluate."""
    if training and config.task in DATASETS and DATASETS[config.task][0] is None:
        raise UserError(
            f"{config.task} is there to evaluate on: train on math, then `python eval.py {config.task} "
            "--team runs/NAME`"
        )
    if config.task in TASKS:
        return TASKS[config.task](config)
    if not config.task.endswith(".py"):
        raise UserError(f"no task {config.task!r}: give {', '.join(TASKS)}, or FILE.py with `task`")
    task = function_from_file(config.task, "task")(dataclasses.replace(config))
    if hasattr(task, "draw") and not hasattr(task, "sample_problems"):
        raise UserError(f"{config.task}: its task's `draw` is called `sample_problems` now: rename it")
    required = ("roles", "sample_problems", "grade")
    missing = [name for name in required if not callable(getattr(task, name, None))]
    if missing:
        raise UserError(f"{config.task}: its task has no {', '.join(missing)}")
    return Guarded(task, config.task)
