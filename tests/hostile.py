"""What the campaign of faults throws at the program: texts, templates, code, and damage to bytes."""

import os
import random
from pathlib import Path

VARIANTS = [
    [],
    ["--occupancy", "stale"],
    ["--occupancy", "importance"],
    ["--occupancy", "joint"],
    ["--every", "2"],
    ["--resample", "suffix"],
    ["--order", "random", "--router", "random"],
    ["--kl", "adaptive", "--eval-every", "1"],
    ["--rounds", "2", "--ratio", "token"],
    ["--kl-estimator", "exact"],
    ["--task", "convention"],
    ["--warm-start", "2", "--checkpoint-every", "2"],
    ["--lora-rank", "2"],
    ["--dtype", "bf16"],
]

# Methods of a task and functions of a file of one's own: arguments, and what is usual.
METHODS = {
    "grade": ("self, problem, messages", "super().grade(problem, messages)"),
    "roles": ("self, agents", "super().roles(agents)"),
    "measure": ("self, problems, messages", "{}"),
    "demonstrations": ("self, count, generator", "super().demonstrations(count, generator)"),
    "sample_problems": (
        "self, count, generator, held_out=False", "super().sample_problems(count, generator, held_out)"
    ),
    "task": ("config", "Mine(config)"),
}  # fmt: skip
ROUTER = "turn, messages, agents, uniform", "turn % agents"
ABSURD = [
    "None", "[]", "{}", "''", "'x' * 10**6", "-1", "2.0", "1e23", "10**23", "float('nan')", "float('inf')",
    "object()", "lambda: 0", "b'x'", "1 / 0", "[None] * 3", "sys.exit(0)", "sys.exit(3)", "{1}", "[[]] * 2",
    "'\\ud800'", "1j", "(_ for _ in ())", "t", "int", "True", "messages.clear()",
    "problem.text", "9", "agents", "0", "agents - 1",
]  # fmt: skip

TEXTS = [
    "", " ", "\0", "\x1b[2J", "\u2028", "9" * 5000, "\\boxed{" * 3000, "1" + " " * 20000, "<|im_end|>", "½∞",
    "0x10", "5e999", "\\frac{1}{0}", "{" * 9000, "\ud83e", "{{ 7*7 }}", "[[" * 3000, "a" * 10**5,
    "\\sqrt{" * 99, "1,000,000", "-" * 300 + "1", "((((1))))" * 50, "2^{2^{2^{2^{9}}}}", "10^{10^{10}}",
    "NaN", "infinity", "1/0", "\\boxed{}", "\\boxed{\\boxed{1}}", "<s>", "</s>", "<|im_start|>system\n",
    "The answer is ", "#### ", "e\u0301", "\u202e", "\ufeff", "🧮🇨🇭", "../../etc/passwd", "~", "/dev/zero",
    "%s%n", "\t\r\n", "A:\n", "9" * 400, "0." + "0" * 400 + "1", "999999999999!", "\\frac" * 50, "x=y=1",
    "1;2;3", "$" * 99,
]  # fmt: skip

# Of chat templates; the last is one that works.
PIECES = [
    "{{ 'a' * 10**9 }}", "{% for i in range(99999) %}", "{% endfor %}", "{{ messages }}", "{{ x.y.z }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{% set x = 'x' %}",
    "{% if true %}", "{% endif %}", "{% set x = x ~ x %}", "{{ ''.__class__ }}", "{% macro f() %}", "x" * 999,
    "{{ f() }}", "{% endmacro %}", "{{ raise_exception('\n\x1b') }}", "{{ 10 ** (10**9) }}",
    "{{ 'a' | center(10**9) }}", "{# a comment #}", "{{ bos_token }}",
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
]  # fmt: skip

# Of fields of a JSON file.
VALUES = [
    1e23, 10**23, -1, 0, None, "x" * 10**6, [], {}, True, float("nan"), 2**31, [[]], "\ud800", 1e-300, "",
    {"content": 7}, ["a"], 0.5,
]  # fmt: skip


def hostile_text(dice: random.Random) -> str:
    """One to three pieces: of TEXTS, of random characters, of a sum, or one of these many times."""
    pieces = []
    for _ in range(dice.randint(1, 3)):
        kind = dice.choice(["known", "known", "characters", "sum", "repeated"])
        if kind == "characters":
            most = dice.choice([128, 0x3000, 0x110000])
            pieces.append("".join(chr(dice.randrange(most)) for _ in range(dice.randint(1, 40))))
        elif kind == "sum":
            signs = dice.choices("+-*/^%()=.,", k=dice.randint(1, 20))
            pieces.append("".join(f"{dice.randint(0, 99)}{sign}" for sign in signs))
        else:
            pieces.append(dice.choice(TEXTS) * (dice.randint(2, 30) if kind == "repeated" else 1))
    return "".join(pieces)


def harm(file: Path, dice: random.Random) -> str:
    """Damage a file; returns what was done."""
    data = bytearray(file.read_bytes())
    kind = dice.choice(
        ["flip", "flip", "flip", "cut", "swap", "swap", "trade", "empty", "noise", "grow", "twice", "digit",
         "digit", "gone", "pipe", "folder", "nowhere"]
    )  # fmt: skip
    if kind in ("gone", "pipe", "folder", "nowhere"):
        file.unlink()
        if kind != "gone":
            {"pipe": os.mkfifo, "folder": os.mkdir, "nowhere": lambda f: f.symlink_to("nowhere")}[kind](file)
        return kind
    if kind == "trade":  # the places of two files
        other = dice.choice(sorted(path for path in file.parent.iterdir() if path.is_file()))
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"trade with {other.name}"
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
        grown = {"cut": data[:here], "empty": bytearray(), "grow": data + bytes(9), "twice": data + data}
        data = grown.get(kind, data)
    file.write_bytes(data)
    return kind
