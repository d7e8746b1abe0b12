"""The kinds of cases of the campaign: each harms one thing and calls the program as a person would.

A case returns "right" or "refused", or raises Fault. It runs in a child of the campaign, whose outputs are
files; there the program is called in this process (`call`), or in a child of it that may be killed (`apart`).
"""

import contextlib
import functools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

from hostile import ABSURD, METHODS, PIECES, ROUTER, VALUES, VARIANTS, harm, hostile_text
from system_faults import Touches, fill, kill_after, own_mounts, read_only, small_disk
from tiny import random_model, write_checkpoint, write_tokenizer

import eval as evaluation
import train
from teamtr_min import cli, rng
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.learner import Learner
from teamtr_min.rollout import collect
from teamtr_min.tasks import Problem, Relay, WordProblems, load_task
from teamtr_min.team import Message, Role, load_team

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # of computing, for one case
TOY = [
    "--agents", "2", "--stages", "2", "--problems", "2", "--group", "4", "--inner-steps", "2", "--keep", "3",
    "--eval-problems", "4", "--lr", "3e-3", "--delta", "0.5", "--device", "cpu",
]  # fmt: skip
PROGRAMS = {"train": train.main, "eval": evaluation.main}
PLAN = ("memory  ", " " * 8)  # how the lines of the memory plan begin
READ = {  # what a command reads of a run
    "resume": "config.json metrics.jsonl transcripts.jsonl checkpoints checkpoints",
    "eval": "config.json agents",
    "kept": "config.json agents eval.jsonl eval.jsonl",
    "export": "config.json agents",
    "report": "config.json metrics.jsonl transcripts.jsonl summary.json",
}
touches = Touches()


class Fault(Exception):
    """A case that gave neither the right result nor one sentence."""


class Place:
    """A case's directory and dice, and what all cases share."""

    def __init__(self, root: Path, dice: random.Random, shared: Path):
        self.root, self.dice, self.shared = root, dice, shared

    def reference(self, *flags: str) -> Path:
        """An undisturbed run, made when first asked for; beside it stands what it took to make."""
        out = self.shared / ("run" + "_".join(flags))
        if not out.exists():
            aside, begin = self.shared / "aside", computed()
            touches.watch(aside)
            code = call("train", [*TOY, *flags, "--out", aside])
            cost = [computed() - begin, touches.stop()]
            lines = map(json.loads, (aside / "metrics.jsonl").read_text().splitlines()) if not code else []
            if not any(line.get("steps") for line in lines):
                raise Fault(f"the undisturbed run {flags} trains nobody: {said('err')}")
            out.with_suffix(".cost").write_text(json.dumps(cost))
            aside.rename(out)
        return out

    def cost(self, reference: Path) -> tuple[float, int]:
        """Seconds of computing, and how often it touched its files."""
        return tuple(json.loads(reference.with_suffix(".cost").read_text()))

    def copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.root / source.name))


def computed() -> float:
    """Seconds of computing of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def said(name: str) -> str:
    """What the program has written since it was called, to `out` or `err`."""
    number = {"out": 1, "err": 2}[name]
    return os.pread(number, 1 << 20, 0).decode(errors="replace")


def call(program: str, argv: list) -> int:
    """The command's exit code; Fault unless it is 0, or 1 or 2 with one sentence."""
    shown = f"{program} {' '.join(map(str, argv))}"[:400]
    for number in (1, 2):
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
    try:
        code = PROGRAMS[program]([str(a) for a in argv])
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = "".join(traceback.format_exception_only(error)).strip()[-400:]
        raise Fault(f"{shown}: {where.filename}, line {where.lineno}: {what}") from None
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    check(code, said("err"), shown)
    return code


def check(code: int, words: str, shown: str) -> None:
    lines = [line for line in words.splitlines() if not line.startswith(PLAN)]
    sentence = len(lines) == 1 and lines[0].startswith(("error: ", "stopped: ")) and len(lines[0]) < 1100
    if code not in (0, 1, 2) or bool(code) != sentence or not code and lines:
        raise Fault(f"{shown}: exit {code}: {words[-600:]}")


def forked(work: Callable[[], object]) -> int:
    """The id of a child that does `work`; its exit code says whether that came to its end."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException as error:
        (Path.cwd() / "fault").write_text(str(error) if isinstance(error, Fault) else traceback.format_exc())
        os._exit(1)


def apart(work: Callable[[], object]) -> None:
    """Do `work` in a child, whose limits, outputs and disks may be harmed; Fault if it raises anything."""
    _, status = os.waitpid(forked(work), 0)
    if os.WIFSIGNALED(status):
        raise Fault(f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    if status:
        raise Fault((Path.cwd() / "fault").read_text())


def finish(place: Place, out: Path, variant: list[str]) -> None:
    """Resume; the result must be that of the undisturbed run."""
    begun = (out / "config.json").exists()
    if not begun:
        shutil.rmtree(out, ignore_errors=True)
    if call("train", ["--resume", out] if begun else [*TOY, *variant, "--out", out]):
        raise Fault(f"no way on: {said('err')[-600:]}")
    same(out, place.reference(*variant))


def same(out: Path, reference: Path) -> None:
    """Fault unless both runs end with the same bits."""
    for file in sorted(reference.glob("agents/*/*")):
        if not (out / file.relative_to(reference)).is_file():
            raise Fault(f"{file.relative_to(reference)} is gone")
        if file.read_bytes() != (out / file.relative_to(reference)).read_bytes():
            raise Fault(f"{file.relative_to(reference)} differs from the undisturbed run's")
    for name in ("metrics.jsonl", "summary.json"):
        if timeless(out / name) != timeless(reference / name):
            raise Fault(f"{name} differs")
    if (out / "transcripts.jsonl").read_bytes() != (reference / "transcripts.jsonl").read_bytes():
        raise Fault("transcripts.jsonl differs")


def timeless(file: Path) -> list:
    text, measured = file.read_text(), ("seconds", "memory", "seal")
    records = [json.loads(text)] if file.suffix == ".json" else map(json.loads, text.splitlines())
    return [{k: v for k, v in record.items() if not k.startswith(measured)} for record in records]


# Kills


def killed(place: Place) -> str:
    """SIGKILL, one to three times, after some computing or at a file that is touched; then to the end."""
    variant = place.dice.choice(VARIANTS)
    seconds, files = place.cost(place.reference(*variant))
    out = place.root / "run"

    def run() -> None:
        touches.watch(out, last)
        call("train", argv)

    kills, wanted = 0, place.dice.choice([1, 1, 2, 3])
    while kills < wanted:
        argv = ["--resume", out] if (out / "config.json").exists() else [*TOY, *variant, "--out", out]
        if argv[0] != "--resume":
            shutil.rmtree(out, ignore_errors=True)
        last = place.dice.randint(1, files) if place.dice.random() < 0.5 else None
        process = forked(run)
        if last is None:
            kill_after(process, place.dice.uniform(0, seconds))
        _, status = os.waitpid(process, 0)
        if status == signal.SIGKILL:
            kills += 1
        elif status:
            raise Fault((Path.cwd() / "fault").read_text() if os.WIFEXITED(status) else f"status {status}")
        elif kills:
            break
        else:  # it ended before: once more
            shutil.rmtree(out)
    finish(place, out, variant)
    return "right"


# Damaged files


def damaged_run(place: Place) -> str:
    """One file of a run that was stopped in its last stage, then one of the commands that read it."""
    flags = place.dice.choice([["--stages", "3"], ["--stages", "3"], ["--lora-rank", "2"]])
    reference = place.reference(*flags)
    argv = ["relay", "--problems", "4", "--json", "--team"]
    if not (reference / "eval.jsonl").exists() and call("eval", [*argv, reference]):
        raise Fault(f"the undisturbed run cannot be evaluated: {said('err')}")
    out = place.copy(reference)
    shutil.rmtree(max((out / "checkpoints").iterdir()))
    command = place.dice.choice(["resume"] * 5 + ["kept"] * 4 + ["eval", "eval", "export", "report"])
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    if place.dice.random() < 0.8:
        first = place.dice.choice(READ[command].split())
        files = [file for file in files if file.startswith(first)]
    file = out / place.dice.choice(files)
    before = contents(out)
    what = f"{harm(file, place.dice)} in {file.relative_to(out)}"
    spoilt = contents(out)
    changed = {path for path in before if before[path] != spoilt.get(path)}
    try:
        if command == "resume":
            code = call("train", ["--resume", out])
        elif command in ("eval", "kept"):
            code = call("eval", [*argv, out] + ["--again"] * (command == "eval"))
        else:
            code = call("eval", [command, "--team", out])
        if code:
            lost = [path for path in spoilt if path not in contents(out)]
            if lost:
                raise Fault(f"{lost[0]} has gone")
        elif command == "resume":
            same(out, reference)
        elif any(path.startswith("agents") for path in changed) and command != "report":
            raise Fault("agents that have changed were used")
        elif command in ("eval", "kept"):
            same_result(json.loads(said("out")), reference)
    except Fault as fault:
        raise Fault(f"{what}, {command}: {fault}") from None
    return "refused" if code else "right"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*") if path.is_file()}  # fmt: skip


def same_result(result: dict, reference: Path) -> None:
    right = json.loads((reference / "eval.jsonl").read_text())
    for name in ("avg_at_k", "pass_at", "tokens_sampled", "team_hash", "task_hash"):
        if result.get(name) != right[name]:
            raise Fault(f"{name} is {result.get(name)}, not {right[name]}")


def a_model(place: Place, long: bool = False) -> Path:
    """A copy of the shipped model, or of a random one that can write any text."""
    kind = place.dice.choice(["relay", "shards", "template", "template"])
    if kind == "relay":
        return place.copy(ROOT / "teamtr_min/assets/relay")
    made = place.shared / f"{kind}{long}"
    if not made.exists():
        model = random_model("qwen2", vocab_size=262, max_positions=32768 if long else 1024)
        write_checkpoint(made, model, shards=2 if kind == "shards" else 1)
        write_tokenizer(made, PIECES[-1] if kind == "shards" else None)
        if kind == "template":
            (made / "chat_template.jinja").write_text(PIECES[-1])
            (made / "generation_config.json").write_text('{"eos_token_id": 1}')
            (made / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    return place.copy(made)


def damaged_model(place: Place) -> str:
    """A file of a model, or a field of one of its JSON files."""
    model = a_model(place)
    file = place.dice.choice(sorted(model.iterdir()))
    if place.dice.random() < 0.3:
        file = place.dice.choice(sorted(model.glob("*.json")))
        what = json_harm(file, place.dice)
    else:
        what = harm(file, place.dice)
    return evaluated(place, ["relay", "--model", model], f"{what} in {file.name}")


def json_harm(file: Path, dice: random.Random) -> str:
    """Give one field, at any depth, another value; returns its name."""
    whole = at = json.loads(file.read_text())
    while True:
        key = dice.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or dice.random() < 0.3:
            break
        at = at[key]
    at[key] = dice.choice(VALUES)
    file.write_text(json.dumps(whole))
    return f"{key!r}: {at[key]!r}"[:200]


def evaluated(place: Place, argv: list, what: str) -> str:
    mode = place.dice.choice(["team", "team", "vote", "best_of", "solo"])
    try:
        flags = "--agents 2 --problems 2 --device cpu --k 2 --json --max-new-tokens 4 --mode"
        code = call("eval", [*argv, *flags.split(), mode])
        if not code:
            result = json.loads(said("out").splitlines()[-1])
            if not (0 <= result["avg_at_k"] <= 1 and 1 <= result["problems"] <= 2):
                raise Fault(f"an odd result: {result}")
    except Fault as fault:
        raise Fault(f"{what[:600]}: {fault}") from None
    return "refused" if code else "right"


def damaged_data(place: Place) -> str:
    """Problems, demonstrations, a task or a router: a file of one's own that a command reads."""
    which = place.dice.choice(["data", "folder", "demonstrations", "task", "router"])
    file = place.root / "mine.py"
    if which in ("data", "folder"):
        lines = [{"question": f"What is {i} and {i}?", "answer": f"{2 * i}"} for i in range(4)]
        file = place.root / "data" / "test.jsonl"
        file.parent.mkdir()
        for name in ("test.jsonl", "train.jsonl"):
            (file.parent / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    elif which == "demonstrations":
        messages = [{"agent": 0, "text": "5*3"}, {"agent": 1, "text": "5"}]
        file = place.root / "demonstrations.jsonl"
        file.write_text(json.dumps({"text": "7+8*3", "messages": messages}) + "\n" * 2)
    else:
        write_task(file, *ROUTER, "", "0")
    what = f"{harm(file, place.dice)} in {file.name}"
    if which == "demonstrations":
        flags = ["--warm-start", "1", "--stages", "1", "--demonstrations", file]
        return trained(place, flags, what)
    flags = {"data": ["jsonl", "--data", file], "folder": ["jsonl", "--data", file.parent],
             "task": [file], "router": ["relay", "--router", file]}[which]  # fmt: skip
    model = "relay" if which in ("task", "router") else a_model(place)
    return evaluated(place, [*flags, "--model", model], what)


def trained(place: Place, flags: list, what: str) -> str:
    try:
        code = call("train", [*TOY, "--model", "relay", *flags, "--out", place.root / "run"])
    except Fault as fault:
        raise Fault(f"{what[:600]}: {fault}") from None
    return "refused" if code else "right"


# Hostile texts, templates, tasks and routers


def hostile_texts(place: Place) -> str:
    """One text, at one of the doors through which a text comes in."""
    text = hostile_text(place.dice)
    doors = [in_problems, in_flags, as_question, as_question, as_role, in_grading, in_grading, in_grading]
    door = place.dice.choice(doors)
    try:
        return door(place, text)
    except UserError as error:
        check(2, f"error: {error}", door.__name__)
        return "refused"
    except Fault as fault:
        raise Fault(f"{door.__name__}, {text[:300]!r} ({len(text)} characters): {fault}") from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{where.filename}, line {where.lineno}: {error!r}"
        raise Fault(f"{door.__name__}, {text[:300]!r} ({len(text)} characters): {what}") from None


def in_problems(place: Place, text: str) -> str:
    """As question and as answer of a file of problems."""
    line = {"question": text, "answer": place.dice.choice([text, "1", hostile_text(place.dice)])}
    (place.root / "data.jsonl").write_text(json.dumps(line))
    model = a_model(place, long=place.dice.random() < 0.1)
    return evaluated(place, ["jsonl", "--data", place.root / "data.jsonl", "--model", model], repr(line))


def in_flags(place: Place, text: str) -> str:
    text = os.fsdecode(text[:9000].replace("\0", "").encode(errors="surrogatepass"))
    flag = place.dice.choice(
        ["model", "router", "task", "data", "question-field", "demonstrations", "resume"]
    )
    given = [f"--{flag}={text}", *(["--task", "jsonl"] if flag == "data" else [])]
    given += ["--warm-start", "1"] * (flag == "demonstrations")
    code = call("train", [*TOY, "--stages", "1", "--out", place.root / "run", *given])
    return "refused" if code else "right"


@functools.cache
def a_team():
    """Two agents with tokenizers of their own, loaded once."""
    places = [Path.cwd() / f"agent-{shift}" for shift in (0, 7)]
    for place, shift in zip(places, (0, 7)):
        write_checkpoint(place, random_model("qwen2", vocab_size=262, max_positions=1024))
        write_tokenizer(place, PIECES[-1], shift=shift)
    config = Config(model=",".join(map(str, places)), agents=2, device="cpu", max_new_tokens=4)
    return load_team(config, [Role("A", "Do."), Role("B", "Check.")])


def as_question(place: Place, text: str) -> str:
    """Put to a team that both agents read and write on; what they read is the text itself."""
    if len(text) > 400 or any("\ud800" <= c <= "\udfff" for c in text):
        return in_grading(place, text)
    team, problem = a_team(), Problem("1", text, text)
    seen = team.render(1, text, [Message(0, [], text, [], False)], add_generation_prompt=True)
    agent = team.agents[1]
    words = agent.tokenizer.decode(seen.ids, skip_special_tokens=False)
    if words.count(text) < 2:  # as the problem, and as what its teammate wrote
        raise Fault(f"the team reads something else: {words[:600]!r}")
    said = [[Message(0, [], words, [], False)] for words in (text, "x")]
    ids = [team.render(1, "x", messages, add_generation_prompt=True).ids for messages in said]
    spelled, usual = (sum(map(agent.tokenizer.is_special, one)) for one in ids)
    if spelled != usual:
        raise Fault("a message became special tokens of its reader")
    rollouts = collect(team, Relay(Config()), [problem], 1, rng.RngPath(0, "eval"))
    if rollouts.returns.tolist() not in ([0.0], [1.0]):
        raise Fault(f"the return is {rollouts.returns.tolist()}")
    return "right"


def as_role(place: Place, text: str) -> str:
    """Name and instructions of an agent, from a task of one's own."""
    file = place.root / "mine.py"
    role = f"__import__('teamtr_min.team').team.Role({text!r}, {text!r})"
    write_task(file, *METHODS["roles"], f"[{role}] * agents", "0")
    return evaluated(place, [file, "--model", a_model(place)], "a role")


def in_grading(place: Place, text: str) -> str:
    """Message and gold answer, alike or not, for each grader."""
    text = text.encode(errors="replace").decode()
    gold = place.dice.choice([text, "12", hostile_text(place.dice)])
    around = place.dice.choice(["{}", "\\boxed{{{}}}", "The answer is {}.", "#### {}"]).format(text)
    tasks = [load_task(Config(task=name)) for name in ("relay", "sums")]
    for task in [*tasks, WordProblems.__new__(WordProblems)]:
        messages = [Message(0, [1], around, [0.0], True)]
        grade = task.grade(Problem("1", "1+1", gold), messages)
        if not (isinstance(grade, float) and 0 <= grade <= 1):
            raise Fault(f"{type(task).__name__} grades it {grade!r}")
        answer = task.answer(messages) if hasattr(task, "answer") else None
        if not isinstance(answer, str | None):
            raise Fault(f"{type(task).__name__} reads {answer!r}")
    return "right"


def hostile_template(place: Place) -> str:
    model = a_model(place)
    pieces = place.dice.choices(PIECES, k=place.dice.randint(1, 3))
    text = "".join(pieces + PIECES[-1:] * place.dice.randint(0, 1))
    (model / "chat_template.jinja").write_text(text)
    return evaluated(place, ["relay", "--model", model], text)


def write_task(file: Path, arguments: str, usual: str, value: str, calls: str) -> None:
    """A task or a router whose function with these arguments returns `value` after so many calls."""
    within = arguments.startswith("self")
    method = next((m for m, known in METHODS.items() if known[0] == arguments), "router")
    harm = f"    calls.append(1)\n    if len(calls) > {calls}:\n        return {value}\n" if value else ""
    body = f"def {method}({arguments}):\n{harm}    return {usual}\n"
    mine = textwrap.indent(body, "    ") if within else "    pass\n"
    lines = ["import sys", "import teamtr_min.tasks as t", "calls = []", "class Mine(t.Relay):", mine]
    lines += ["" if method == "task" else "task = Mine", "" if within else body]
    file.write_text("\n".join(lines), encoding="utf-8")


def hostile_task(place: Place) -> str:
    """A task that returns or raises something absurd, at once or after a while."""
    method = place.dice.choice(list(METHODS))
    flags = ["--warm-start", "1"] if method == "demonstrations" else []
    return hostile_code(place, *METHODS[method], ["--task", place.root / "mine.py", *flags])


def hostile_router(place: Place) -> str:
    return hostile_code(place, *ROUTER, ["--router", place.root / "mine.py"])


def hostile_code(place: Place, arguments: str, usual: str, flags: list) -> str:
    value, calls = place.dice.choice(ABSURD), place.dice.choice(["0", "0", "9", "40"])
    write_task(place.root / "mine.py", arguments, usual, value, calls)
    return trained(place, ["--stages", "1", *flags], f"({arguments}) returns {value} after {calls} calls")


# NaN and infinity


def poisoned(place: Place) -> str:
    """NaN or infinity in a gradient, a weight or a return: stopped, and without it the run goes on."""
    variant = place.dice.choice(VARIANTS)
    where, value = (
        place.dice.choice(["gradient", "weight", "return"]),
        place.dice.choice([math.nan, math.inf]),
    )
    reference, after = place.reference(*variant), place.dice.randint(0, 2)
    step, grade, dice = Learner.step, Relay.grade, place.dice

    def poisoned_step(learner, lr):
        nonlocal after
        after -= 1
        if after < 0:
            p = dice.choice([p for p in learner.masters if p.grad is not None])
            (p.grad if where == "gradient" else p.data).view(-1)[dice.randrange(p.numel())] = value
        return step(learner, lr)

    def poisoned_grade(task, problem, messages):
        nonlocal after
        after -= 1
        return value if after < 0 else grade(task, problem, messages)

    with contextlib.ExitStack() as undo:
        undo.callback(setattr, Learner, "step", step)
        undo.callback(setattr, Relay, "grade", grade)
        if where == "return":
            after *= 9
            Relay.grade = poisoned_grade
        else:
            Learner.step = poisoned_step
        code = call("train", [*TOY, *variant, "--out", place.root / "run"])
    if not code and after < 0:
        raise Fault(f"{value} in a {where} went unnoticed with {variant}")
    if code:
        finish(place, place.root / "run", variant)
    else:  # it made fewer steps than that, or its task grades in another way
        same(place.root / "run", reference)
    return "refused" if code else "right"


# Disks and outputs


def full_disk(place: Place) -> str:
    """A disk that fills up as a file is touched, or files that cannot grow; then there is room again."""
    _, files = place.cost(place.reference())
    disk, limited = place.root / "disk", place.dice.random() < 0.3
    last, left = place.dice.randint(1, files), int(math.exp(place.dice.uniform(0, math.log(3e6))))
    disk.mkdir()

    def run() -> None:
        mounted = not limited and own_mounts() and small_disk(disk, 1 << 26)
        if mounted:
            touches.watch(disk / "run", last, lambda: fill(disk, left))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000 + left, -1))
        code = call("train", [*TOY, "--out", disk / "run"])
        touches.stop()
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        (disk / "filler").unlink(missing_ok=True)
        (place.root / "code").write_text(str(code))
        finish(place, disk / "run", [])

    apart(run)
    return "refused" if int((place.root / "code").read_text()) else "right"


def mounts() -> bool:
    """Whether this system lets a process have disks of its own."""
    here = Path.cwd()
    _, status = os.waitpid(forked(lambda: os._exit(0 if own_mounts() and read_only(here) else 1)), 0)
    return status == 0


def read_only_disk(place: Place) -> str:
    """A run on a disk that cannot be written: it can be read, and is what it was."""
    reference = place.reference()
    out = place.copy(reference)
    shutil.rmtree(max((out / "checkpoints").iterdir()))
    before, command = contents(out), place.dice.choice(["train", "resume", "eval", "export"])

    def run() -> None:
        own_mounts()
        read_only(out)
        argv = {"train": ["train", [*TOY, "--out", out / "new"]], "resume": ["train", ["--resume", out]],
                "eval": ["eval", ["relay", "--team", out, "--problems", "4", "--again"]],
                "export": ["eval", ["export", "--team", out]]}[command]  # fmt: skip
        if not call(*argv):
            raise Fault(f"{command} on a read-only disk succeeded")

    apart(run)
    if contents(out) != before:
        raise Fault(f"{command} changed a read-only disk")
    finish(place, out, [])
    return "refused"


def closed_output(place: Place) -> str:
    """stdout or stderr is closed, full, or a pipe whose reader has left."""
    how = place.dice.choice(["1-", "2-", "1-2-", "0-1-2-", "1|", "2|", "1f", "1f2f"])
    out = place.root / "run"
    if place.dice.random() < 0.1:  # all of it, from the shell
        shell = {"1-": ">&-", "2-": "2>&-", "1-2-": ">&- 2>&-", "0-1-2-": "<&- >&- 2>&-", "1f": "> /dev/full",
                 "1|": "| head -1", "2|": "2>&1 >&- | head -1", "1f2f": "> /dev/full 2>&1"}[how]  # fmt: skip
        command = f"'{sys.executable}' train.py {' '.join(TOY)} --out '{out}' {shell}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        if "Traceback" in done.stderr or done.stderr.count("\n") > 1:
            raise Fault(f"{shell}: {done.stderr[-600:]}")
    else:
        apart(lambda: with_outputs(how, [*TOY, "--out", str(out)]))
    finish(place, out, [])
    return "right"


def with_outputs(how: str, argv: list[str]) -> None:
    """As `train.py` begins and ends with these outputs."""
    reader, pipe = os.pipe()
    os.close(reader)
    words, dead = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    os.ftruncate(words, 0)
    for number, harmed in zip(map(int, how[::2]), how[1::2]):
        if harmed == "-":
            os.close(number)
        else:
            os.dup2({"|": pipe, "f": dead}[harmed], number)
    os.close(pipe)
    os.close(dead)
    for number, name in ((1, "stdout"), (2, "stderr")):
        gone = f"{number}-" in how
        setattr(sys, name, None if gone else open(number, "w", closefd=False))  # noqa: SIM115
    cli.open_streams()
    code = train.main(argv)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    text = os.pread(words, 1 << 20, 0).decode()
    if code not in (0, 1, 2) or "Traceback" in text or text.count("\n") > 1:
        raise Fault(f"{how}: exit {code}: {text[-600:]}")


# How often each kind comes up: of a hundred cases or so, and at least in a long run.
SHARES = {
    killed: 8, damaged_run: 25, damaged_model: 22, damaged_data: 8, hostile_texts: 30, hostile_template: 3,
    hostile_task: 5, hostile_router: 3, poisoned: 3, full_disk: 3, read_only_disk: 2, closed_output: 2,
}  # fmt: skip
LONG = {
    killed: 100, damaged_run: 700, damaged_model: 1100, damaged_data: 200, hostile_texts: 1000,
    hostile_template: 60, hostile_task: 80, hostile_router: 40, poisoned: 40, full_disk: 30,
    read_only_disk: 20, closed_output: 20,
}  # fmt: skip
