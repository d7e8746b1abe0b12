"""A campaign of random faults on toy runs: `python -m tests.campaign --seed S --minutes M`.

Each case harms one thing and runs the program as a person would. It must give the right result, or one
sentence and exit code 1 or 2, within 60 seconds, and lose nothing: what was stopped resumes to the bits of a
run that nobody disturbed. A case is a function of the seed and its number; `--only N` repeats one.
"""

import argparse
import collections
import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TEAMTR_KERNELS", "torch")

from hostile import ABSURD, METHODS, PIECES, TEXTS, VARIANTS  # noqa: E402
from tiny import random_model, write_checkpoint, write_tokenizer  # noqa: E402

SECONDS, MEMORY = 60, 8 << 30  # of a case: time on the clock, and address space in bytes
TOY = [
    "--agents", "2", "--stages", "3", "--problems", "3", "--group", "4", "--inner-steps", "2", "--keep", "3",
    "--eval-problems", "8", "--lr", "3e-3", "--delta", "0.5", "--device", "cpu",
]  # fmt: skip


class Fault(Exception):
    """A case that gave neither the right result nor one sentence."""


def attempt(program: str, argv: list[str], output: str, poison: str, file_size: int) -> None:
    """The child: the command with its outputs in files; `poison` spoils the numbers of each step."""
    os.chdir(Path(output).parent)  # results of evaluations are kept there
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    import torch

    import eval as evaluation
    import train
    from teamtr_min.learner import Learner

    torch.set_num_threads(1)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    step, value = Learner.step, math.inf if "inf" in poison else math.nan

    def poisoned(learner, lr):
        for p in learner.masters[:1]:
            if "gradient" in poison:
                p.grad.view(-1)[0] = value
            elif "weight" in poison:
                p.data.view(-1)[0] = value
        return step(learner, lr)

    if poison:
        Learner.step = poisoned
    code = {"train": train.main, "eval": evaluation.main}[program](argv)
    sys.stdout.flush()
    sys.exit(code)


class Place:
    """A case's directory and dice, and what it may do."""

    def __init__(self, root: Path, dice: random.Random, context):
        self.root, self.dice, self.context = root, dice, context

    def start(self, program: str, argv: list, poison: str = "", file_size: int = 0):
        arguments = (program, [str(a) for a in argv], str(self.root / "said"), poison, file_size)
        child = self.context.Process(target=attempt, args=arguments)
        child.start()
        return child

    def run(self, program: str, argv: list, **harm) -> int:
        """The exit code; Fault unless it is 0, or 1 or 2 with one sentence."""
        child = self.start(program, argv, **harm)
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            raise Fault(f"{program} took more than {SECONDS} s")
        said = (self.root / "said.err").read_text(errors="replace").strip()
        last = said.rpartition("\n")[2]  # above it stands the memory plan
        sentence = last.startswith(("error: ", "stopped: ")) and len(last) < 1100 and "Traceback" not in said
        if child.exitcode not in (0, 1, 2) or child.exitcode and not sentence:
            raise Fault(f"{program} {' '.join(map(str, argv))[:300]}: exit {child.exitcode}: {said[-600:]}")
        return child.exitcode

    def finish(self, out: Path, variant: list[str], reference: Path) -> None:
        """Resume; the result must be that of the undisturbed run."""
        begun = (out / "config.json").exists()
        if not begun:
            shutil.rmtree(out, ignore_errors=True)
        if self.run("train", ["--resume", out] if begun else [*TOY, *variant, "--out", out]):
            raise Fault(f"no way on: {(self.root / 'said.err').read_text()[:600]}")
        same(out, reference)


def timeless(file: Path) -> list:
    records = map(json.loads, file.read_text().splitlines())
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in records]


def same(out: Path, reference: Path) -> None:
    """Fault unless both runs end with the same bits."""
    for file in sorted(reference.glob("agents/*/*")):
        if file.read_bytes() != (out / file.relative_to(reference)).read_bytes():
            raise Fault(f"{file.relative_to(reference)} differs from the undisturbed run's")
    if timeless(out / "metrics.jsonl") != timeless(reference / "metrics.jsonl"):
        raise Fault("metrics.jsonl differs")
    if (out / "transcripts.jsonl").read_bytes() != (reference / "transcripts.jsonl").read_bytes():
        raise Fault("transcripts.jsonl differs")


def harm(file: Path, dice: random.Random) -> str:
    """Damage a file; returns what was done."""
    data = bytearray(file.read_bytes())
    kind = dice.choice(
        ["flip", "flip", "cut", "swap", "empty", "noise", "grow", "digit", "gone", "pipe", "folder"]
    )
    if kind in ("gone", "pipe", "folder"):
        file.unlink()
        if kind != "gone":
            (os.mkfifo if kind == "pipe" else os.mkdir)(file)
        return kind
    here, there = dice.randrange(len(data) or 1), dice.randrange(len(data) or 1)
    if kind == "flip" and data:
        data[here] ^= 1 << dice.randrange(8)
    elif kind == "swap" and data:
        data[here], data[there] = data[there], data[here]
    elif kind == "noise":
        data[here : here + 64] = dice.randbytes(64)
    elif kind == "digit":
        digits = [i for i, byte in enumerate(data[:20000]) if 48 <= byte < 58]
        if digits:
            here = dice.choice(digits)
            data[here] = 48 + (data[here] - 48 + dice.randint(1, 9)) % 10
    else:
        data = {"cut": data[:here], "empty": bytearray(), "grow": data + bytes(9)}.get(kind, data)
    file.write_bytes(data)
    return kind


def killed(place: Place, references) -> str:
    """SIGKILL at up to three random moments, then to the end."""
    variant = place.dice.choice(VARIANTS)
    reference, seconds = references(variant)
    out = place.root / "run"
    for _ in range(place.dice.randint(1, 3)):
        argv = ["--resume", out] if (out / "config.json").exists() else [*TOY, *variant, "--out", out]
        if argv[0] != "--resume":
            shutil.rmtree(out, ignore_errors=True)
        child = place.start("train", argv)
        child.join(place.dice.uniform(0, 1.2) * seconds)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
    place.finish(out, variant, reference)
    return "right"


def damaged_run(place: Place, references) -> str:
    """One file of a stopped run, then one of the commands that read it."""
    reference, _ = references([])
    out = Path(shutil.copytree(reference, place.root / "run"))
    command = place.dice.choice(["resume", "eval", "report"])
    if command == "resume":  # as a kill in the last stage leaves it
        shutil.rmtree(out / "checkpoints" / "000003")
    files = sorted(file for file in out.rglob("*") if file.is_file())
    file = place.dice.choice(files)
    whole, what = file.read_bytes(), harm(file, place.dice)
    before = {path for path in out.rglob("*") if path.is_file()}
    argv = {"resume": ["--resume", out], "report": ["report", "--team", out],
            "eval": ["relay", "--team", out, "--problems", "8", "--again"]}[command]  # fmt: skip
    try:
        code = place.run("train" if command == "resume" else "eval", argv)
        if not code and command == "resume":
            same(out, reference)
        changed = not file.is_file() or file.read_bytes() != whole
        if not code and command == "eval" and "agents" in file.parts and changed:
            raise Fault("agents that have changed were evaluated")
        if code and before - {path for path in out.rglob("*")}:
            raise Fault("files have gone")
    except Fault as fault:
        raise Fault(f"{what} in {file.relative_to(out)}, {command}: {fault}") from None
    return "refused" if code else "right"


def a_model(place: Place) -> Path:
    """The shipped model, or a random one that can write any text."""
    model = place.root / "model"
    if place.dice.random() < 0.3:
        return Path(shutil.copytree(ROOT / "teamtr_min/assets/relay", model))
    write_checkpoint(model, random_model("qwen2", vocab_size=262), shards=place.dice.choice([1, 2]))
    return write_tokenizer(model, place.dice.choice([None, PIECES[-1]]))


def damaged_model(place: Place, references) -> str:
    """A file of a model, or a field of its config.json."""
    model = a_model(place)
    file = place.dice.choice(sorted(model.iterdir()))
    if place.dice.random() < 0.4:
        file = model / place.dice.choice(["config.json", "tokenizer_config.json"])
        raw = json.loads(file.read_text())
        values = [
            1e23,
            10**23,
            -1,
            0,
            None,
            "x" * 10**6,
            [],
            {},
            True,
            math.nan,
            2**31,
            [[]],
            "\ud800",
            1e-300,
        ]
        what = place.dice.choice(sorted(raw))
        raw[what] = place.dice.choice(values)
        file.write_text(json.dumps(raw))
    else:
        what = harm(file, place.dice)
    return evaluated(place, ["relay", "--model", model], f"{what} in {file.name}")


def evaluated(place: Place, argv: list, what: str) -> str:
    try:
        code = place.run("eval", [*argv, "--agents", "2", "--problems", "4", "--device", "cpu", "--k", "2",
                                  "--max-new-tokens", "8",
                                  "--mode", place.dice.choice(["team", "vote"])])  # fmt: skip
    except Fault as fault:
        raise Fault(f"{what[:600]}: {fault}") from None
    return "refused" if code else "right"


def hostile_texts(place: Place, references) -> str:
    dice = place.dice
    texts = TEXTS if dice.random() < 0.3 else [text for text in TEXTS if text.isprintable() and text.strip()]
    lines = [{"question": "".join(dice.choices(texts, k=2)), "answer": dice.choice(texts)} for _ in range(4)]
    (place.root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return evaluated(
        place, ["jsonl", "--data", place.root / "data.jsonl", "--model", a_model(place)], repr(lines)
    )


def hostile_template(place: Place, references) -> str:
    model = a_model(place)
    pieces = place.dice.choices(PIECES, k=place.dice.randint(1, 3))
    text = "".join(pieces + PIECES[-1:] * place.dice.randint(0, 1))
    (model / "chat_template.jinja").write_text(text)
    return evaluated(place, ["relay", "--model", model], text)


def hostile_code(place: Place, references) -> str:
    """A task, or a router, that returns or raises something absurd, at once or after a while."""
    method, value = place.dice.choice(list(METHODS)), place.dice.choice(ABSURD)
    arguments, usual = METHODS[method]
    within, calls = arguments.startswith("self"), place.dice.choice([0, 0, 9, 40])
    harm = f"    calls.append(1)\n    if len(calls) > {calls}:\n        return {value}"
    body = f"def {method}({arguments}):\n{harm}\n    return {usual}\n"
    mine = textwrap.indent(body, "    ") if within else "    pass\n"
    lines = ["import sys", "import teamtr_min.tasks as t", "calls = []", "class Mine(t.Relay):", mine]
    lines += ["task = Mine", "" if within else body]
    file = place.root / "mine.py"
    file.write_text("\n".join(lines))
    flag = "--router" if method == "router" else "--task"
    try:
        code = place.run("train", [*TOY, flag, file, "--model", "relay", "--out", place.root / "run"])
    except Fault as fault:
        raise Fault(f"{body}: {fault}") from None
    return "refused" if code else "right"


def poisoned(place: Place, references) -> str:
    """NaN or infinity in a gradient or a weight: stopped, and without the poison it goes on."""
    variant = place.dice.choice(VARIANTS)
    reference, _ = references(variant)
    poison = place.dice.choice(["nan gradient", "inf gradient", "nan weight", "inf weight"])
    if not place.run("train", [*TOY, *variant, "--out", place.root / "run"], poison=poison):
        raise Fault(f"{poison} went unnoticed with {variant}")
    place.finish(place.root / "run", variant, reference)
    return "refused"


def full_disk(place: Place, references) -> str:
    reference, _ = references([])
    size = int(math.exp(place.dice.uniform(math.log(300), math.log(2e6))))
    code = place.run("train", [*TOY, "--out", place.root / "run"], file_size=size)
    place.finish(place.root / "run", [], reference)
    return "refused" if code else "right"


def closed_output(place: Place, references) -> str:
    out, how = place.root / "run", place.dice.choice([">&-", "2>&-", ">&- 2>&-", "| head -1", "> /dev/full"])
    command = f"'{sys.executable}' train.py {' '.join(TOY)} --out '{out}' {how}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=2 * SECONDS
    )
    if "Traceback" in done.stderr or done.stderr.count("\n") > 1:
        raise Fault(f"{how}: {done.stderr[-600:]}")
    place.finish(out, [], references([])[0])
    return "right"


CASES = {
    killed: 3, damaged_run: 6, damaged_model: 5, hostile_texts: 3, hostile_template: 2, hostile_code: 6,
    poisoned: 1, full_disk: 2, closed_output: 1,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--only", type=int, help="the number of one case")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "eval", "torch._dynamo"])
    known, end = {}, time.monotonic() + 60 * args.minutes
    counts, failures = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as folder:

        def references(variant: list[str]) -> tuple[Path, float]:
            """An undisturbed run, made when first asked for, and the seconds that it took."""
            key = " ".join(variant)
            if key not in known:
                root = Path(folder, f"reference-{len(known)}")
                root.mkdir()
                begin = time.monotonic()
                if Place(root, random.Random(0), context).run(
                    "train", [*TOY, *variant, "--out", root / "run"]
                ):
                    raise Fault(f"{variant}: {(root / 'said.err').read_text()}")
                known[key] = root / "run", time.monotonic() - begin
            return known[key]

        number = args.only or 0
        while time.monotonic() < end:
            dice, place = random.Random(f"{args.seed} {number}"), Path(folder, f"case-{number}")
            (case,) = dice.choices(list(CASES), list(CASES.values()))
            place.mkdir()
            try:
                counts[case.__name__][case(Place(place, dice, context), references)] += 1
            except (Fault, subprocess.TimeoutExpired) as fault:
                counts[case.__name__]["failed"] += 1
                failures.append(f"case {number}, {case.__name__}: {fault}")
                print(failures[-1], file=sys.stderr, flush=True)
            shutil.rmtree(place, ignore_errors=True)
            number += 1
            if args.only is not None:
                break
    print("| case | cases | right | refused in one sentence | failed |\n|---|---|---|---|---|")
    for name, count in sorted(counts.items()):
        numbers = (count.total(), count["right"], count["refused"], count["failed"])
        print(f"| {name.replace('_', ' ')} | {' | '.join(map(str, numbers))} |")
    total = sum(count.total() for count in counts.values())
    print(f"\nseed {args.seed}: {total} cases, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
