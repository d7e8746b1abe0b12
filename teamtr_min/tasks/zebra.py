"""Logic grid puzzles, also called zebra or Einstein's puzzles: who lives where, with which things? [ours]"""

import functools
import re
from collections.abc import Iterable

import numpy as np
from numpy.random import Generator

from teamtr_min.config import Config
from teamtr_min.files import UserError, read_jsonl, sha256
from teamtr_min.tasks.task import NAMES, Generated, Message, Problem

SIZES = [f"{houses}x{attributes}" for houses in range(2, 7) for attributes in range(2, 7)]
ATTRIBUTES = {  # how a clue names the person; what there is to draw from
    "name": ("{}", NAMES),
    "pet": ("the owner of the {}", "cat dog fish goat horse mouse parrot rabbit".split()),
    "drink": ("the {} drinker", "cocoa coffee juice lemonade milk tea water wine".split()),
    "job": ("the {}", "baker carpenter doctor farmer lawyer pilot tailor teacher".split()),
    "colour": ("the person in the {} house", "black blue brown green grey red white yellow".split()),
    "game": ("the {} player", "bridge chess cricket darts football golf hockey tennis".split()),
}
NOT = {-5, -4, -3, -2, -1, 1, 2, 3, 4, 5}
CLUES = [  # how many houses b may be to the right of a; whether b is a house; the sentence
    ({0}, True, "{a} lives in {b}."), (NOT, True, "{a} does not live in {b}."), ({0}, False, "{a} is {b}."),
    (NOT, False, "{a} is not {b}."), ({1}, False, "{a} lives directly left of {b}."),
    ({-1}, False, "{a} lives directly right of {b}."), ({-1, 1}, False, "{a} lives next to {b}."),
    ({1, 2, 3, 4, 5}, False, "{a} lives somewhere to the left of {b}."),
    ({-2, 2}, False, "There is one house between {a} and {b}."),
]  # fmt: skip


class Zebra(Generated):
    """Houses in a row, with a name, a pet, ... each, and clues about them -> `House 1: Ben, cat` and so on.

    With n turns each message gives an n-th of the houses; a later line about a house replaces an earlier one.
    The return is the share of right cells. The clues leave one solution. No training puzzle has the names and
    things of a held-out one. `zebra-3x4` has 3 houses with 4 attributes; `zebra` mixes all sizes, and reads
    puzzles in ZebraLogicBench's form by `--data`, which are the held-out ones then."""

    split, fields = "zebra", None
    system = "Solve the puzzle as a team. Write the next houses, a line each, such as: House 1: Ana, cat"

    def __init__(self, config: Config):
        self.name, self.size = config.task, config.task.partition("-")[2]
        super().__init__(config)
        self.published = read_grids(config.data) if config.data else []
        self.version = f"1 {sha256(config.data)}" if config.data else "1"

    def draw(self, generator: Generator) -> str:
        """The houses and their attributes, without clues."""
        houses, attributes = map(int, (self.size or generator.choice(SIZES)).split("x"))
        names = ["name", *generator.choice([*ATTRIBUTES][1:], attributes - 1, replace=False)]
        drawn = [generator.choice(ATTRIBUTES[name][1], houses, replace=False) for name in names]
        rows = [f"{name}: {', '.join(sorted(row))}" for name, row in zip(names, drawn)]
        return "\n".join([f"{houses} houses in a row, house 1 on the left.", *rows])

    def problem(self, drawn: str, generator: Generator) -> Problem:
        return puzzle(drawn, int(generator.integers(2**62)))

    def identity(self, text: str) -> list[str]:
        return sorted(re.findall(r"(?m)^[a-z]+: .*", text))

    def is_held_out(self, text: str) -> bool:
        return super().is_held_out(text) or any(text == problem.text for problem in self.published)

    def sample_problems(self, count: int, generator: Generator, held_out: bool = False) -> list[Problem]:
        found = held_out and self.published[:count]
        return found or super().sample_problems(count, generator, held_out)

    def shown(self, problem: Problem, generator: Generator) -> list[str]:
        lines = problem.answer.split("; ")
        first = [turn * len(lines) // self.turns for turn in range(self.turns + 1)]
        return ["\n".join(lines[a : max(a + 1, b)]) for a, b in zip(first, first[1:])]

    def grade(self, problem: Problem, messages: list[Message]) -> float:
        right, given = grid([problem.answer]), grid(m.text for m in messages)
        cells = [given.get(h, [])[i : i + 1] == [x] for h, row in right.items() for i, x in enumerate(row)]
        return sum(cells) / len(cells)

    def answer(self, messages: list[Message]) -> str | None:
        return written(sorted(grid(m.text for m in messages).items())) or None


def written(rows: Iterable[tuple[int | str, list[str]]]) -> str:
    return "; ".join(f"House {house}: {', '.join(row)}" for house, row in rows)


def grid(texts: Iterable[str]) -> dict[str, list[str]]:
    """House -> its values, in lower case, from the last line about it."""
    lines = [m for text in texts for m in re.findall(r"(?i)\bhouse (\d+)[\"*_]{0,3}: *+([^\n;]*+)", text)]
    return {h: [x.rpartition(":")[2].strip(" .*_\"'`{}").lower() for x in row.split(",")] for h, row in lines}


@functools.lru_cache(maxsize=4096)  # a run looks at its first problems before it starts
def puzzle(drawn: str, seed: int) -> Problem:
    """Draw a solution for these houses and attributes, and clues that tell it."""
    generator, rows = np.random.default_rng(seed), [line.split(": ") for line in drawn.splitlines()[1:]]
    things = [(name, thing) for name, row in rows for thing in row.split(", ")]
    n = len(things) // len(rows)
    at = [*np.concatenate([generator.permutation(n) for _ in rows]).tolist(), *range(n)]
    names = [ATTRIBUTES[k][0].format(x) for k, x in things] + [f"house {h + 1}" for h in range(n)]
    clues = [CLUES[kind][2].format(a=names[a], b=names[b]) for kind, a, b in needed(n, at, generator)]
    text = f"{drawn}\nClues: {' '.join(clue[0].upper() + clue[1:] for clue in clues)}"
    lives = [(h + 1, [thing for (_, thing), house in zip(things, at) if house == h]) for h in range(n)]
    return Problem(f"{n}x{len(rows)}", text, written(lives))


def needed(n: int, at: list[int], generator: Generator) -> list[tuple]:
    """Random clues that hold where value i is in house at[i]; they leave one solution, and all are needed."""
    count, keyed = len(at) - n, []
    for kind, (far, house, _) in enumerate(CLUES):  # each kind as often as others
        true = [(kind, a, b) for a in range(count) for b in (range(count, len(at)) if house else range(count))
                if a != b and at[b] - at[a] in far]  # fmt: skip
        keyed += [(i + generator.random(), true[k]) for i, k in enumerate(generator.permutation(len(true)))]
    clues = [clue for _, clue in sorted(keyed)]
    full = [(1 << n) - 1] * count + [1 << h for h in range(n)]
    kept = next(some for k in range(n, len(clues) + n, n) if solutions(n, full, some := clues[:k]) == 1)
    for clue in kept:
        rest = [other for other in kept if other != clue]
        kept = rest if solutions(n, full, rest) == 1 else kept
    return kept


def solutions(n: int, domains: list[int], clues: list[tuple]) -> int:
    """How many there are: 0, 1, or 2 for more, and for what 200 looks do not tell. `clues`: (kind, a, b).
    `domains`: bit masks of the houses that each value may be in, n values to an attribute."""
    found, stack = 0, [domains]
    for _ in range(200):
        if not stack or found == 2:
            return found
        domains, before = stack.pop()[:], None
        while domains != before and all(domains):
            before = domains[:]
            for kind, a, b in clues:
                domains[b] &= reach(domains[a], kind, 1)
                domains[a] &= reach(domains[b], kind, -1)
            for i, d in enumerate(domains):
                if not d & (d - 1):  # no other value of the attribute is in its house
                    for k in range(i // n * n, i // n * n + n):
                        domains[k] &= d if k == i else ~d
        if all(domains):
            free = sorted((d.bit_count(), i) for i, d in enumerate(domains) if d & (d - 1))
            found += not free
            for _, i in free[:1]:  # try each house for the value with the fewest
                stack += [[*domains[:i], 1 << h, *domains[i + 1 :]] for h in range(n) if domains[i] >> h & 1]
    return 2


@functools.cache
def reach(houses: int, kind: int, sign: int) -> int:
    """The houses that b can be in if a is in one of these; with sign -1 those of a, given b's."""
    places = {h + sign * d for h in range(6) if houses >> h & 1 for d in CLUES[kind][0]}
    return sum(1 << h for h in places if h >= 0)


def read_grids(path: str) -> list[Problem]:
    """The puzzles of a JSONL file in the form of ZebraLogicBench's grid_mode. Raises UserError."""
    problems = []
    for number, record in read_jsonl(path):
        try:
            (_, *header), rows = record["solution"]["header"], record["solution"]["rows"]
            text = f"{record['puzzle']}\nWrite each house as: House 1: {', '.join(header)}"
            problems.append(Problem(str(record["id"]), text, written((row[0], row[1:]) for row in rows)))
            if "___" in problems[-1].answer:
                raise UserError(f"{path}, line {number}: the solution is blank, as in all public copies")
        except (LookupError, TypeError, ValueError):
            form = 'has no "id", "puzzle" and "solution" with "header" and "rows" of texts'
            raise UserError(f"{path}, line {number} {form}: {str(record)[:100]}") from None
    if not problems:
        raise UserError(f"{path} holds no puzzles")
    return problems
