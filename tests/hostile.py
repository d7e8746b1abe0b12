"""What the campaign of faults throws at the program, beside damaged bytes."""

VARIANTS = [
    [],
    ["--occupancy", "stale"],
    ["--occupancy", "importance"],
    ["--occupancy", "joint"],
    ["--every", "2"],
    ["--resample", "suffix"],
    ["--order", "random", "--router", "random"],
    ["--kl", "adaptive"],
    ["--rounds", "2", "--ratio", "token"],
    ["--task", "convention"],
    ["--lora-rank", "2"],
    ["--dtype", "bf16"],
]

# Methods of a task and functions of a file of one's own: arguments, and what is usual.
METHODS = {
    "grade": ("self, problem, messages", "super().grade(problem, messages)"),
    "roles": ("self, agents", "super().roles(agents)"),
    "measure": ("self, problems, messages", "{}"),
    "sample_problems": (
        "self, count, generator, held_out=False", "super().sample_problems(count, generator, held_out)"
    ),
    "router": ("turn, messages, agents, uniform", "turn % agents"),
    "task": ("config", "Mine(config)"),
}  # fmt: skip
ABSURD = [
    "None", "[]", "{}", "''", "'x' * 10**6", "-1", "2.0", "1e23", "10**23", "float('nan')", "float('inf')",
    "object()", "lambda: 0", "b'x'", "1 / 0", "[None] * 3", "sys.exit(0)", "sys.exit(3)", "{1}", "[[]] * 2",
    "'\\ud800'", "1j", "(_ for _ in ())", "t", "int",
]  # fmt: skip

TEXTS = [
    "", " ", "\0", "\x1b[2J", "\u2028", "9" * 5000, "\\boxed{" * 3000, "1" + " " * 20000, "<|im_end|>", "½∞",
    "0x10", "5e999", "\\frac{1}{0}", "{" * 9000, "\ud83e", "{{ 7*7 }}", "[[" * 3000, "a" * 10**5,
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
