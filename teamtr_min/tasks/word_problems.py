"""Word problems with short answers, from JSONL and parquet files: those of `--data`, and data sets that go by
name, downloaded once. A URL names a commit; a file's sha256 is checked when it is fetched, not when read."""

import collections
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError, read_jsonl
from teamtr_min.hf.weights import DATA_FILES, hub_data
from teamtr_min.tasks.answers import RULES, canonical, extract_answer, is_correct
from teamtr_min.tasks.equivalence import grader
from teamtr_min.tasks.task import Message, Problem, Role, Task

# What a team does together, how its first agent begins, and how each message ends.
MATHS = "solves a maths problem together", "Work it out step by step.", "the final answer in \\boxed{}."
ANY = "answers a question together", "Think it through.", 'a line "Answer: ..." that holds the answer alone.'


def solver_roles(agents: int, task: str = "jsonl") -> list[Role]:
    """A solver, checkers, and a finisher who gives the answer, told of maths where that is the task."""
    together, work, ending = MATHS if task in DATASETS else ANY
    team, final = f"of a team that {together}.", f"End with {ending}"
    first = f"You are the first {team} {work} {final}"
    check = f"You are one {team} Check the work so far; correct it. {final}"
    last = f"You are the last {team} Decide what is right. {final}"
    systems = [first] + [check] * (agents - 2) + [last] * (agents > 1)
    return [Role(f"Agent {j + 1}", system) for j, system in enumerate(systems)]


class WordProblems(Task):
    """Questions of a data set that goes by name or, with `--data`, of JSONL files of the user's own.

    `--data` names a directory with train.jsonl and test.jsonl, or one file, of which every tenth problem, by
    a hash of its text, is held out. Training problems whose text is also a held-out one's are left out. The
    team's answer is the last that a message states. The return is 1 if it is right (`is_correct`), else 0.
    Without `read` there are no problems: it is the task of a team that only answers questions."""

    def __init__(self, config: Config, read: bool = True):
        self.fields = question, answer = tuple(config.fields.split(","))
        self.path = Path(config.data or config.task)  # for messages
        self.grader, self.notes, self.name = grader(), [], config.task
        if not read:
            return
        root, *sides = problem_files(config.task, config.data)
        question = question if config.data else DATASETS[config.task][2]
        of_file = functools.partial(read_problems, question_field=question, answer_field=answer, root=root)
        self.train, self.held_out = ([p for file in files for p in of_file(file)] for files in sides)
        if not sides[1]:
            self.held_out = [p for p in self.train if rng.key(0, p.text) % 10 == 0]
            self.train = [p for p in self.train if rng.key(0, p.text) % 10]
        content = json.dumps([(p.text, p.answer) for p in self.all_problems()])
        self._hash = hashlib.sha256(content.encode()).hexdigest()
        self._held_out_texts = {" ".join(normalize("NFC", p.text.lower()).split()) for p in self.held_out}
        both = {p.id for p in self.train if self.is_held_out(p.text)}
        self.leave_out(both, "they stand among the held-out ones too")

    def roles(self, agents: int) -> list[Role]:
        return solver_roles(agents, self.name)

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        """`count` different problems: training ones at random, or the first held-out ones."""
        if count > len(self.train) and not held_out or not self.held_out:
            has = f"{self.path} has only {len(self.train)} to train on and {len(self.held_out)} held out"
            raise UserError("; ".join([f"{count} problems were asked for, but {has}", *self.notes]))
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

    same = staticmethod(canonical)

    def answer(self, messages: list[Message]) -> str | None:
        """The answer that the team states last."""
        return extract_answer(last_statement(messages))

    def fingerprint(self) -> dict[str, str]:
        return {"problems": self._hash, "grader": f"{self.grader}, rules {RULES}"}


def last_statement(messages: list[Message]) -> str:
    """The text of the last message that states an answer; empty if none does."""
    return next((m.text for m in reversed(messages) if extract_answer(m.text) is not None), "")


DATASETS = {  # name -> the file to train on, or None; the held-out file; the field of the question
    "gsm8k": ("gsm8k-train", "gsm8k-test", "question"),
    "math": ("math-train", "math500", "problem"),  # 12,000 and 500 problems of MATH
    **{name: (None, name, "problem") for name in ("math500", "aime24", "aime25", "amc23")},  # to evaluate on
}
SIDES = ("train", "test", "validation", "dev")  # names in the paths of a data set of the hub

GITHUB = "https://raw.githubusercontent.com"
GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
MATH = "https://media.githubusercontent.com/media/openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163"
QWEN = f"{GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"
AIME25 = "https://huggingface.co/datasets/math-ai/aime25/resolve/563bb8404243c5f09de6ec262f2db674fe5bce9b"
FILES = {  # name -> URL, beginning of the sha256
    "gsm8k-train": (f"{GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c5"),
    "gsm8k-test": (f"{GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066"),
    "math-train": (f"{MATH}/prm800k/math_splits/train.jsonl", "90d96daeac3fe343ebb1e22ce93dd996"),
    "math500": (f"{MATH}/prm800k/math_splits/test.jsonl", "35dc41080a3680858b27fa7e0533d2d5"),
    "aime24": (f"{QWEN}/aime24/test.jsonl", "af2b8bd2aa911b6333ad0df32f3ca05c"),
    "aime25": (f"{AIME25}/test.jsonl", "b4e273c02d3e7fe1b74b59eae768fc82"),
    "amc23": (f"{QWEN}/amc23/test.jsonl", "43707e1ca784602d8479de24ee8ce366"),
}


def problem_files(task: str, data: str) -> tuple[Path, list[Path], list[Path]]:
    """Of `--data`, else of the data set `task`: the directory; files to train on; files held out, none where
    a part of the others is to be. Raises UserError."""
    path, found = Path(data), collections.defaultdict(list)
    if not data and task not in DATASETS:
        raise UserError(f"--task {task} needs --data: a file, or a directory of train.jsonl and test.jsonl")
    if not data:
        train, test = ([local_copy(name)] if name else [] for name in DATASETS[task][:2])
        return test[0].parent, train, test
    if not (on_hub := hub_data(data)):
        sides = [path / "train.jsonl"], [path / "test.jsonl"]
        return (path, *sides) if path.is_dir() else (path.parent, [path], [])
    root, name = on_hub
    for file in sorted(file for file in root.rglob("*") if file.suffix in DATA_FILES):
        words = re.findall("[a-z]+", str(file.relative_to(root)).lower())
        found[next((side for side in SIDES if side in words), "")].append(file)
    train = found["train"] or found[""]
    folders = sorted({file.relative_to(root).parts[0] for file in train if file.parent != root} - {"train"})
    if not train or len(folders) > 1:
        fault = f"needs its folder, such as {data}:{folders[0]}" if train else "has no JSONL or parquet files"
        raise UserError(f"--data {data} {fault} ({', '.join(folders) or name})")
    return root, train, next((found[side] for side in SIDES[1:] if side in found), [])


def local_copy(name: str) -> Path:
    """The file `name` in the cache; the first call downloads it. Raises UserError if that fails."""
    cache = Path(os.environ.get("TEAMTR_CACHE") or Path.home() / ".cache" / "teamtr-min" / "datasets")
    path, (url, sha256) = cache / f"{name}.jsonl", FILES[name]
    if not path.is_file():
        from torch.hub import download_url_to_file  # it renames the file once the hash is right

        try:
            cache.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"no {name} from {url} ({error}): give a copy with --data") from None
    return path


def read_problems(path: str | Path, question_field: str, answer_field: str, root="") -> list[Problem]:
    """Problems from a JSONL or parquet file. A problem's id is the file's name, below the directory `root` if
    one is given, and its line. Raises UserError."""
    path, problems = Path(path), []
    name = path.relative_to(root or path.parent)
    for number, record in (read_parquet if path.suffix == ".parquet" else read_jsonl)(path):
        values = record.get(question_field), record.get(answer_field)
        texts = [str(v) for v in values if isinstance(v, str | float | int) and str(v).strip()]
        if len(texts) < 2:
            wanted = f'a text in "{question_field}" and in "{answer_field}" (or --fields)'
            raise UserError(f"{path}, line {number}: must have {wanted}, but is {str(record)[:100]}")
        answer = extract_answer(texts[1]) or texts[1]
        problems.append(Problem(f"{name}, line {number}", texts[0], answer))
    if not problems:
        raise UserError(f"{path} holds no problems")
    return problems


def read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Number, from 1, and fields of each row. Raises UserError."""
    try:
        from pyarrow import parquet  # late: few runs need it

        return enumerate(parquet.read_table(path).to_pylist(), start=1)
    except ImportError:
        raise UserError(f"{path} is parquet, which needs pyarrow: pip install pyarrow") from None
    except (ValueError, OSError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"{path} cannot be read: {error}") from None
