"""Word problems with short answers, from JSONL files such as GSM8K's."""

import hashlib
import json
from pathlib import Path
from unicodedata import normalize

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError, read_jsonl
from teamtr_min.tasks.answers import RULES, canonical, extract_answer, is_correct
from teamtr_min.tasks.datasets import data_set
from teamtr_min.tasks.equivalence import grader
from teamtr_min.tasks.task import Message, Problem, Role, Task


def solver_roles(agents: int) -> list[Role]:
    """A solver, checkers, and a finisher who gives the answer."""
    team = "of a team that solves a maths problem together."
    final = "End with the final answer in \\boxed{}."
    first = f"You are the first {team} Work it out step by step. {final}"
    check = f"You are one {team} Check the work so far; correct it. {final}"
    last = f"You are the last {team} Decide what is right. {final}"
    systems = [first] + [check] * (agents - 2) + [last] * (agents > 1)
    return [Role(f"Agent {j + 1}", system) for j, system in enumerate(systems)]


class WordProblems(Task):
    """Questions of a data set that goes by name or, with `--data`, of JSONL files of the user's own.

    `--data` names a directory with train.jsonl and test.jsonl, or one file, of which every tenth problem, by
    a hash of its text, is held out. Training problems whose text is also a held-out one's are left out. The
    team's answer is the last that a message states. The return is 1 if it is right (`is_correct`), else 0."""

    def __init__(self, config: Config):
        self.fields = question, answer = tuple(config.fields.split(","))
        self.path = Path(config.data or config.task)  # for messages
        self.grader, self.notes = grader(), []
        if config.data and not self.path.is_dir():
            problems = read_problems(self.path, question, answer)
            self.train = [p for p in problems if rng.key(0, p.text) % 10]
            self.held_out = [p for p in problems if rng.key(0, p.text) % 10 == 0]
        else:
            train, test = self.path / "train.jsonl", self.path / "test.jsonl"
            if not config.data:
                train, test, question = data_set(config.task)
            self.train = read_problems(train, question, answer) if train else []
            self.held_out = read_problems(test, question, answer)
        content = json.dumps([(p.text, p.answer) for p in self.all_problems()])
        self._hash = hashlib.sha256(content.encode()).hexdigest()
        self._held_out_texts = {" ".join(normalize("NFC", p.text.lower()).split()) for p in self.held_out}
        both = {p.id for p in self.train if self.is_held_out(p.text)}
        self.leave_out(both, "they stand among the held-out ones too")

    roles = staticmethod(solver_roles)

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        """`count` different problems: training ones at random, or the first held-out ones."""
        if count > len(self.train) and not held_out or not self.held_out:
            few = f"--problems {count}, but {self.path} has only {len(self.train)} to train on and "
            raise UserError("; ".join([f"{few}{len(self.held_out)} held out", *self.notes]))
        if held_out:
            return self.held_out[:count]
        return [self.train[i] for i in generator.choice(len(self.train), count, replace=False)]

    def all_problems(self) -> list[Problem]:
        return self.train + self.held_out

    def leave_out(self, ids: set[str], why: str) -> None:
        """Draw the problems with these ids no more; `notes` says how many they are and `why`."""
        before = len(self.all_problems())
        self.train, self.held_out = ([p for p in ps if p.id not in ids] for ps in (self.train, self.held_out))
        if gone := before - len(self.all_problems()):
            self.notes.append(f"{gone:,} problems of {self.path} are left out: {why}")

    def is_held_out(self, text: str) -> bool:
        return " ".join(normalize("NFC", text.lower()).split()) in self._held_out_texts

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        return float(is_correct(last_statement(messages), problem.answer))

    def answer(self, messages: list[Message]) -> str | None:
        """The team's answer, such that equal ones are equal texts."""
        stated = extract_answer(last_statement(messages))
        return stated and canonical(stated)

    def fingerprint(self) -> dict[str, str]:
        return {"problems": self._hash, "grader": f"{self.grader}, rules {RULES}"}


def last_statement(messages: list[Message]) -> str:
    """The text of the last message that states an answer; empty if none does."""
    return next((m.text for m in reversed(messages) if extract_answer(m.text) is not None), "")


def read_problems(path: str | Path, question_field: str, answer_field: str) -> list[Problem]:
    """Problems from a JSONL file. A problem's id is the file's name and its line. Raises UserError."""
    problems = []
    for number, record in read_jsonl(path):
        values = record.get(question_field), record.get(answer_field)
        texts = [str(v) for v in values if isinstance(v, str | float | int) and str(v).strip()]
        if len(texts) < 2:
            wanted = f'a text in "{question_field}" and in "{answer_field}" (or --fields)'
            raise UserError(f"{path}, line {number}: must have {wanted}, but is {str(record)[:100]}")
        answer = extract_answer(texts[1]) or texts[1]
        problems.append(Problem(f"{Path(path).name}, line {number}", texts[0], answer))
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems
