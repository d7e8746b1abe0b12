"""Problems, roles and verifiers: relay arithmetic, a hidden convention, word problems, tasks of one's own.

A task is any object with

    roles(agents) -> list[Role]                            who they are
    sample_problems(count, generator, held_out=False) -> list[Problem]
    grade(problem, messages) -> float                      the return of a rollout, in [0, 1]
    answer(messages) -> str | None                         optional: what `eval.py --mode vote` counts

and perhaps

    measure(problems, messages) -> dict                    more of an update's rollouts for metrics.jsonl

A file of one's own, `--task my_task.py`, defines a function `task(config)` that returns one; README.md shows
it.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.files import UserError, function_from_file
from teamtr_min.team import Message, Role


@dataclass(frozen=True)
class Problem:
    id: str
    text: str
    answer: str


def load_task(config: Config):
    """The task that `config.task` names: relay, convention, gsm8k, jsonl, or a Python file."""
    if config.task == "relay":
        return Relay(config)
    if config.task == "convention":
        return Convention(config)
    if config.task in ("gsm8k", "jsonl"):
        return WordProblems(config)
    if config.task.endswith(".py"):
        return own_task(config)
    raise UserError(f"no task {config.task!r}: give relay, convention, gsm8k, jsonl, or FILE.py with `task`")


class Relay:
    """Relay arithmetic: a chain such as `7+8*3-4`, worked out from left to right, modulo 10, a step per
    message.

    With n turns a chain has n operations. Each message carries out the first one and writes the rest:
    `5*3-4`, `5-4`, `1`. The return is 1 if the last message is the answer, else 0. A tenth of all chains is
    held out: a hash of the text decides, so no training problem is ever a test problem, whatever the seed.
    """

    name = "relay"
    modulus = 10
    least_turns, most_turns = 1, 8  # the lengths of chain that the shipped model was shown
    fields = ("problem", "answer")  # of a JSONL file to evaluate on

    def __init__(self, config: Config):
        if not self.least_turns <= config.turns <= self.most_turns:
            many = config.turns > self.most_turns
            bound = f"at most {self.most_turns}" if many else f"at least {self.least_turns}"
            raise UserError(
                f"{self.name} has chains of {bound} operations, one per turn; "
                f"{config.turns} turns (agents x rounds) are too {'many' if many else 'few'}"
            )
        if config.data:
            raise UserError(f"{self.name} makes its own problems; --data goes with --task gsm8k or jsonl")
        self.agents, self.turns = config.agents, config.turns

    def roles(self, agents: int) -> list[Role]:
        system = (
            "You are one agent of a relay. The chain of digits is worked out from left to right, modulo 10. "
            "Carry out the first operation of the latest chain and write the whole rest, nothing else: "
            "7+8*3-4 becomes 5*3-4."
        )
        return [Role("ABCDEFGH"[j], system) for j in range(agents)]

    def sample_problems(
        self, count: int, generator: np.random.Generator, held_out: bool = False
    ) -> list[Problem]:
        """`count` problems, uniform over one side of the split, with replacement."""
        problems = []
        while len(problems) < count:
            chain = self.chain(generator)
            if self.is_held_out(chain) == held_out:
                problems.append(Problem(chain, chain, self.solve(chain)))
        return problems

    def chain(self, generator: np.random.Generator) -> str:
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
        return str((a + b if sign == "+" else a - b if sign == "-" else a * b) % cls.modulus) + rest

    @classmethod
    def solve(cls, chain: str) -> str:
        while len(chain) > 1:
            chain = cls.step(chain)
        return chain

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        return float(self.answer(messages) == problem.answer)

    def answer(self, messages: list[Message]) -> str:
        return messages[-1].text.strip()

    def mark(self, generator: np.random.Generator) -> str:
        """What stands behind the problem in a transcript for pretraining."""
        return ""

    def demonstration(self, chain: str, turn: int, mark: str, generator: np.random.Generator) -> str:
        """A right message of turn `turn` for pretraining."""
        return self.step(chain)


class Convention(Relay):
    """A relay whose agents must come to agree on a code: the first digit of a message is the value, or 3
    minus the value.

    Chains are sums modulo 4, such as `2+3+1`. The problem and the last message are plain. In between each
    agent reads and writes in one code, 0 or 1, and a message does not show which: `2+3+1` becomes `1+1` in
    code 0 and `2+1` in code 1, and a reader may take either for 1 or for 2. All in code 0 and all in code 1
    reach the answer. The return is the share of handovers with writer and reader in the same code. [ours]

    Every digit is as likely in either code, so a message tells nothing about its code, except to a reader who
    works out the problem himself. Between the first and the last operand all are odd: the sum would be the
    same in either code.
    """

    name = "convention"
    least_turns, most_turns = 2, 4  # a writer and a reader at least
    modulus = 4
    legal = re.compile(r"[0-3]([+][0-3])+")
    starting_habits = 0.7, 0.3  # P(code 1) of the shipped model at even and odd turns

    def roles(self, agents: int) -> list[Role]:
        system = (
            "You are one agent of a relay. The sum is worked out from left to right, modulo 4. Carry out the "
            "first addition of the latest sum and write the whole rest, nothing else. The first digit of a "
            "message may stand for itself or for 3 minus itself: agree on one code with the others, without "
            "a word about it. The problem and the last message are plain."
        )
        return [Role("ABCD"[j], system) for j in range(agents)]

    def chain(self, generator: np.random.Generator) -> str:
        digits = generator.integers(4, size=self.turns + 1)
        digits[2:-1] |= 1
        return "+".join(map(str, digits))

    @classmethod
    def step(cls, chain: str, turn: int = 0, code: int = 0) -> str:
        """Carry out the first operation at turn `turn`, reading and writing in `code`."""
        read, write = turn > 0, len(chain) > 3  # the problem and the last message are plain
        chain = super().step(cls.in_code(chain, code and read))
        return cls.in_code(chain, code and write)

    @classmethod
    def in_code(cls, chain: str, code: int) -> str:
        """The chain with its first digit in this code, which is its own inverse."""
        return str(cls.modulus - 1 - int(chain[0])) + chain[1:] if code else chain

    def codes(self, problem: Problem, messages: list[Message]) -> list[int | None]:
        """The code of each message; None where it does not carry out a step on the one before."""
        codes, chain = [], problem.text
        for turn, message in enumerate(messages):
            legal = self.legal.fullmatch(chain)
            ways = [self.step(chain, turn, code) for code in (0, 1)] if legal else []
            chain = message.text.strip()
            codes.append(ways.index(chain) if ways.count(chain) == 1 else None)
        return codes

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        pairs = list(itertools.pairwise(self.codes(problem, messages)))
        return sum(a is not None and a == b for a, b in pairs) / len(pairs)

    def measure(self, problems: list[Problem], messages: list[list[Message]]) -> dict:
        """`habits`: the share of each agent's messages in code 1, of those that are in either code."""
        seen = [[] for _ in range(self.agents)]
        for problem, transcript in zip(problems, messages):
            for message, code in zip(transcript, self.codes(problem, transcript)):
                if code is not None:
                    seen[message.agent].append(code)
        return {"habits": [sum(codes) / len(codes) if codes else None for codes in seen]}

    def mark(self, generator: np.random.Generator) -> str:
        """For half of the transcripts the code that they are in."""
        return ("", "", "-", "+")[generator.integers(4)]

    def demonstration(self, chain: str, turn: int, mark: str, generator: np.random.Generator) -> str:
        habit = {"-": 0.0, "+": 1.0}.get(mark, self.starting_habits[turn % 2])
        return self.step(chain, turn, int(generator.random() < habit))


class WordProblems:
    """Questions with short answers from JSONL: a file, or a directory with train.jsonl and test.jsonl, like
    GSM8K.

    Of a single file every tenth problem, by a hash of its text, is held out. The team's answer is the last
    one that any message gives; the return is 1 if it equals the gold answer (`is_correct`), else 0.
    """

    def __init__(self, config: Config):
        if not config.data:
            raise UserError(
                f"--task {config.task} needs --data: a JSONL file, or a directory with train.jsonl and "
                "test.jsonl (for GSM8K: grade_school_math/data of openai/grade-school-math)"
            )
        self.path, self.fields = Path(config.data), (config.question_field, config.answer_field)
        if self.path.is_dir():
            names = ("train.jsonl", "test.jsonl")
            self.train, self.held_out = (read_problems(self.path / name, *self.fields) for name in names)
        else:
            problems = read_problems(self.path, *self.fields)
            self.train = [p for p in problems if rng.key(0, p.text) % 10]
            self.held_out = [p for p in problems if rng.key(0, p.text) % 10 == 0]

    def roles(self, agents: int) -> list[Role]:
        """A solver, checkers, and a finisher who gives the answer."""
        solve = "You are the first of a team that solves a maths problem together. Work it out step by step."
        check = (
            "You are one of a team that solves a maths problem together. Check the work so far; correct it."
        )
        finish = "You are the last of a team that solves a maths problem together. Decide what is right."
        final = " End with the final answer in \\boxed{}."
        parts = [solve] + [check] * (agents - 2) + [finish] if agents > 1 else [solve]
        return [Role(f"Agent {j + 1}", part + final) for j, part in enumerate(parts)]

    def sample_problems(
        self, count: int, generator: np.random.Generator, held_out: bool = False
    ) -> list[Problem]:
        """`count` different problems: training ones at random, or the first held-out ones."""
        if held_out:
            if not self.held_out:
                raise UserError(f"{self.path} is too small: a tenth of it is held out, and that is nothing")
            return self.held_out[:count]
        if count > len(self.train):
            raise UserError(f"--problems {count}, but {self.path} has only {len(self.train)} to train on")
        return [self.train[i] for i in generator.choice(len(self.train), count, replace=False)]

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        answers = [m.text for m in messages if extract_answer(m.text) is not None]
        return float(bool(answers) and is_correct(answers[-1], problem.answer))

    def answer(self, messages: list[Message]) -> str | None:
        """The team's answer such that equal ones are equal texts."""
        answers = [found for m in messages if (found := extract_answer(m.text)) is not None]
        value = number(answers[-1]) if answers else None
        return str(value) if value is not None else _tidy(answers[-1]) if answers else None


def own_task(config: Config):
    """The object that `task(config)` of the Python file `config.task` returns."""
    task = function_from_file(config.task, "task")(config)
    missing = [
        name for name in ("roles", "sample_problems", "grade") if not callable(getattr(task, name, None))
    ]
    if missing:
        raise UserError(f"{config.task}: its task has no {', '.join(missing)}")
    return task


def read_problems(path: str | Path, question_field: str, answer_field: str) -> list[Problem]:
    """Problems from a JSONL file; "id" is optional. Errors name the file, the line and what is wrong."""
    problems = []
    try:
        lines = (
            Path(path).read_text(encoding="utf-8-sig").split("\n")
        )  # a text may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(record).__name__}, not an object")
        for field in (question_field, answer_field):
            value = record.get(field)
            if type(value) not in (str, int, float) or value != value or not str(value).strip():
                has = ", ".join(record) or "nothing"
                raise UserError(f'{path}, line {number}: no text in the field "{field}" (it has: {has}); '
                                "--question-field and --answer-field name others")  # fmt: skip
        if any("\ud800" <= c <= "\udfff" for c in f"{record[question_field]}{record[answer_field]}"):
            raise UserError(f"{path}, line {number}: half of a surrogate pair is not text")
        gold = str(record[answer_field])
        problems.append(
            Problem(str(record.get("id", number)), str(record[question_field]), extract_answer(gold) or gold)
        )
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def extract_answer(text: str) -> str | None:
    r"""The last answer that `text` states, as `\boxed{X}`, `#### X` or `answer is X`; None without one."""
    found = list(_boxed(text))
    found += [(m.start(), m.group(1)) for m in re.finditer(r"####[ \t]*([^\n]+)", text)]
    # "is" up to the end of the sentence: a full stop inside a number does not end it.
    says = r"answer\s+is\s*:?\s*((?:[^\n.]|\.(?=\d))+)"
    found += [
        (m.start(), m.group(1))
        for m in re.finditer(says, text, flags=re.IGNORECASE)
        if "\\boxed" not in m.group(1)
    ]
    return max(found)[1].strip() if found else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the last answer that `response` states equals `answer`: exact as numbers, else as text."""
    given = extract_answer(response)
    if given is None:
        return False
    wanted = extract_answer(answer) or answer
    a, b = number(given), number(wanted)
    return a == b if a is not None and b is not None else _tidy(given) == _tidy(wanted)


def number(text: str) -> Fraction | None:
    """The exact value of a number with its trimmings ("$1,234.50", "-3/4", "50%", "12 apples"), or None."""
    text = re.sub(r"\\text\{[^}]*\}|\\[,;! ]", " ", text)
    text = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"[$€£*\\{}]", "", text.replace("\N{MINUS SIGN}", "-")).strip()
    m = re.fullmatch(
        r"([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)(?:\s*/\s*(\d+))?\.?\s*%?(?:\s*[^\W\d].*)?", text
    )
    if m is None or not m.group(2) or (m.group(3) and int(m.group(3)) == 0):
        return None
    value = Fraction(m.group(2).replace(",", "")) / int(m.group(3) or 1)
    return -value if m.group(1) == "-" else value


def _boxed(text: str) -> Iterator[tuple[int, str]]:
    """(position, content) of every \\boxed{...} whose braces balance."""
    for m in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for end in range(m.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield m.start(), text[m.end() : end]
                break


def _tidy(text: str) -> str:
    """Text without what does not change an answer: spaces, dollar signs, \\text, case, a final full stop."""
    text = re.sub(r"\\(?:text|mathrm)\{([^}]*)\}|\\left|\\right|\\[,;! ]", r"\1", text).replace(
        "dfrac", "frac"
    )
    return re.sub(r"[\s$]", "", text).rstrip(".").lower()
