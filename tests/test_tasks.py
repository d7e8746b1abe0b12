"""Tasks that make their own problems: right answers, a held-out split, draws that stay as they are."""

import hashlib
import itertools
import json
import math
import re

import numpy as np
import pytest
from tiny import refusal, said

from teamtr_min.bench import accuracy
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.rollout import collect
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Convention, Floors, Message, Relay, load_task, zebra


def task(name: str, agents: int, **flags):
    return load_task(Config(task=name, agents=agents, **flags))


def problems(game, count: int, *path, **how):
    return game.sample_problems(count, rng.generator(*path), **how)


@pytest.mark.parametrize("name, agents", [
    ("relay", 1), ("relay", 2), ("relay", 5), ("convention", 3), ("sums", 1), ("sums", 3), ("floors", 3),
    ("zebra-2x2", 2),
])  # fmt: skip
def test_the_held_out_split_never_overlaps_training_or_demonstrations(name, agents):
    game = task(name, agents)
    trained = {p.text for seed in range(5) for p in problems(game, 500, seed, "problems", 0)}
    trained |= {d.problem.text for d in game.demonstrations(300, rng.generator(0))}
    held_out = {p.text for p in problems(game, 500, 0, "held-out", held_out=True)}
    assert trained and held_out and not trained & held_out
    assert all(map(game.is_held_out, held_out)) and not any(map(game.is_held_out, trained))


def test_draws_stay_as_they_are():
    """The shipped models and the published results rest on these."""
    seen = []
    for name, agents in itertools.product(("relay", "convention", "sums"), (2, 3)):
        game, generator = task(name, agents), rng.generator(0, "problems", agents)
        drawn = game.sample_problems(200, generator) + game.sample_problems(100, generator, held_out=True)
        seen += [(p.id, p.text, p.answer) for p in drawn]
        seen += [(d.problem.text, d.messages) for d in game.demonstrations(50, generator)]
        seen += [(role.name, role.system) for role in game.roles(agents)]
    assert hashlib.sha256(repr(seen).encode()).hexdigest()[:16] == "d126a160bcbb3574"


@pytest.mark.parametrize("turns", [1, 2, 3, 8])
def test_relay_chains_are_worked_out_from_left_to_right_and_only_the_last_message_counts(turns):
    assert [Relay.step(chain) for chain in ("7+8*3-4", "5*3-4", "2-7")] == ["5*3-4", "5-4", "5"]
    game = task("relay", turns)
    for problem in problems(game, 200, 0, turns):
        value = int(problem.text[0])
        for sign, digit in zip(problem.text[1::2], problem.text[2::2]):
            value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[sign]
        right, wrong = str(value % 10), str((value + 1) % 10)
        assert len(problem.text) == 2 * turns + 1 and problem.answer == right
        assert game.grade(problem, said("nonsense", f" {right}\n")) == 1
        assert not any(game.grade(problem, said(right, last)) for last in (wrong, "", right * 2))


@pytest.mark.parametrize("agents", range(1, 7))
def test_a_story_of_sums_tells_its_numbers_and_each_step_goes_on_from_the_one_before(agents):
    game = task("sums", agents)
    for shown in game.demonstrations(100, rng.generator(0, agents)):
        told = [int(word.strip(".")) for word in shown.problem.text.split() if word.strip(".").isdigit()]
        assert len(told) == agents + 1 and len(shown.messages) == agents
        total = told[0]
        for line, count in zip(shown.messages, told[1:]):
            a, sign, b, equals, result = line.split()
            total += count if sign == "+" else -count
            assert int(a) + {"+": 1, "-": -1}[sign] * int(b) == total == int(result)
            assert int(b) == count and equals == "=" and 1 <= total <= 15
        assert shown.problem.answer == str(total) and game.grade(shown.problem, said(*shown.messages)) == 1


def test_in_sums_the_number_that_the_last_message_ends_with_is_the_answer():
    game = task("sums", 2)
    (problem,) = problems(game, 1, 3)
    right = problem.answer
    for last in (right, f"9 + 1 = {right}", f"So it is {right}.", f"**{right}**\n"):
        assert game.grade(problem, said("?", last)) == 1, last
    for last in ("", "none", f"{right} or so", f"1{right}", f"{right}0", f"-{right}", f"{right} = x"):
        assert game.grade(problem, said(right, last)) == 0, last
    assert game.answer(said("9" * 10**6 + "x")) is None and game.answer(said("1!" * 10**6 + "x")) is None


def played(problem, codes: tuple[int, ...]) -> list[Message]:
    """The messages of agents that make no mistake, one code each. By the rules, not by Convention.step."""
    digit, rest, texts = int(problem.text[0]), problem.text[1:], []
    for turn, code in enumerate(codes):
        value = ((3 - digit if code and turn else digit) + int(rest[1])) % 4
        rest = rest[2:]
        digit = 3 - value if code and rest else value
        texts.append(f"{digit}{rest}")
    return said(*texts)


@pytest.mark.parametrize("agents", [2, 3, 4])
def test_the_return_of_convention_is_the_share_of_handovers_in_one_code(agents):
    game = task("convention", agents)
    for problem in problems(game, 50, 0, agents):
        for codes in itertools.product((0, 1), repeat=agents):
            messages = played(problem, codes)
            agree = [a == b for a, b in itertools.pairwise(codes)]
            assert game.codes(problem, messages) == list(codes)
            assert game.grade(problem, messages) == sum(agree) / len(agree)
            if all(agree):
                assert messages[-1].text == problem.answer, "one code, whichever, reaches the answer"
            elif agents < 4:  # in longer chains two misreadings may cancel
                assert messages[-1].text != problem.answer
    first, *rest = played(problem, (1,) * agents)
    assert game.measure([problem], [[first, *rest]]) == {"habits": [1.0] * agents}
    for wrong in ("", "12", problem.text, "x", rest[0].text):  # it is no step, so it has no code
        messages = [*said(wrong), *rest]
        assert game.codes(problem, messages)[0] is None and game.grade(problem, messages) < 1
        assert game.measure([problem], [messages])["habits"][0] is None
    for operand, code in itertools.product("0123", (0, 1)):  # a first digit tells nothing about its code
        assert {game.step(f"{a}+{operand}+1", 0, code)[0] for a in range(4)} == set("0123")


@pytest.mark.parametrize("agents", [2, 3])
def test_the_shipped_model_starts_with_opposite_habits_and_right_arithmetic(agents):
    config = Config(task="convention", agents=agents)
    game = load_task(config)
    rollouts = collect(build_team(config, game), problems(game, 512, 3), 1, rng.RngPath(config.seed, "test"))
    codes = [game.codes(p, m) for p, m in zip(rollouts.problems, rollouts.messages)]
    for turn in range(agents):
        known = [row[turn] for row in codes if row[turn] is not None]
        assert len(known) > 0.95 * len(codes)
        assert np.mean(known) == pytest.approx(Convention.starting_habits[turn % 2], abs=0.08)
    # What the reader does hardly depends on what the writer did.
    zero, one = ([row[1] for row in codes if row[0] == code and row[1] is not None] for code in (0, 1))
    assert abs(np.mean(zero) - np.mean(one)) < 0.12


def handed_on(n: int, codes: tuple[int, ...]) -> list[Message]:
    floors = [*itertools.accumulate(codes[:-1], initial=n)]
    return said(*(f"floor {floor}" for floor in floors[1:]), f"{floors[-1] - codes[-1]} flights")


@pytest.mark.parametrize("agents", [2, 3, 4])
def test_floors_is_right_exactly_when_the_codes_cancel(agents):
    game = task("floors", agents)
    for problem in problems(game, 20, 0, held_out=True):
        n = int(problem.answer)
        for codes in itertools.product((0, 1), repeat=agents):
            messages = handed_on(n, codes)
            assert game.codes(problem, messages) == list(codes)
            assert game.grade(problem, messages) == (sum(codes[:-1]) == codes[-1])
    first, *rest = handed_on(n, (1,) * agents)
    for wrong in ("", "floor", "4 or 5", f"floor {n + 2}", f"floor {n - 1}"):
        first, second, *_ = game.codes(problem, [*said(wrong), *rest])
        assert first is None and (any(map(str.isdigit, wrong)) or second is None)
    played_twice = [handed_on(n, code + (0,) * (agents - 2)) for code in ((0, 1), (1, 1))]
    assert game.measure([problem] * 2, played_twice) == {"habits": [0.5, 1.0, *[0.0] * (agents - 2)]}


def test_only_the_first_agent_of_floors_can_know_the_number():
    game, seen = task("floors", 3), {}
    drawn = problems(game, 4000, 0) + problems(game, 200, 0, held_out=True)
    for problem in drawn:
        assert game.view(problem, 0) == problem.text and problem.answer in problem.text
        hidden = game.view(problem, 1)
        assert game.view(problem, 2) == hidden and not any(c.isdigit() for c in hidden)
        seen.setdefault(hidden, set()).add(problem.answer)
    assert len(seen) > 500 and sum(len(numbers) > 3 for numbers in seen.values()) > 0.7 * len(seen)
    counts = np.bincount([int(p.answer) for p in drawn])[Floors.fewest :]
    assert len(counts) == 7 and counts.min() > 500 and counts.max() < 700
    for problem in drawn[-20:] + drawn[:20]:  # the split, too, is the same for every number
        assert len({game.is_held_out(problem.text.replace(problem.answer, str(n))) for n in range(2, 9)}) == 1


@pytest.mark.parametrize("agents", [2, 3])
def test_demonstrations_of_floors_begin_with_opposite_habits(agents):
    game = task("floors", agents)
    shown = game.demonstrations(3000, rng.generator(0))
    messages = [said(*d.messages) for d in shown]
    habits = game.measure([d.problem for d in shown], messages)["habits"]
    assert habits == pytest.approx([0.3] * (agents - 1) + [0.7], abs=0.03)
    codes = np.array([game.codes(d.problem, m) for d, m in zip(shown, messages)], dtype=float)
    assert abs(np.corrcoef(codes.T)[0, -1]) < 0.06, "each agent draws for itself"


SAYS = {  # words of a clue -> what it says of the houses of the two that it names
    "not": lambda a, b: a != b, "directly left": lambda a, b: a + 1 == b,
    "directly right": lambda a, b: a == b + 1, "next": lambda a, b: abs(a - b) == 1,
    "to the left": lambda a, b: a < b, "between": lambda a, b: abs(a - b) == 2, "": lambda a, b: a == b,
}  # fmt: skip


@pytest.mark.parametrize("size", zebra.SIZES)
def test_the_clues_leave_the_stated_solution_alone_and_none_can_be_left_out(size):
    houses, attributes = map(int, size.split("x"))
    for problem in problems(task(f"zebra-{size}", 2), 8, 0, size):
        rows = [line.split(": ")[1].split(", ") for line in problem.text.splitlines()[1:-1]]
        clues, words = [], "|".join(values := list(itertools.chain(*rows)))
        for clue in problem.text.split("Clues: ")[1].rstrip(".").split(". "):
            a, b = re.findall(rf"\b({words}|house \d)\b", clue)
            clues.append((a, b, next(holds for said, holds in SAYS.items() if re.search(said, clue))))
        fits = lambda at, clues: all(f(at[a], at.get(b) or int(b[6:])) for a, b, f in clues)  # noqa: E731
        at = {value: int(h) for h, row in zebra.grid([problem.answer]).items() for value in row}
        assert fits({value: at[value.lower()] for value in values}, clues) and len(at) == houses * attributes
        if math.factorial(houses) ** attributes < 3000:  # few enough to try all
            rows = itertools.product(itertools.permutations(range(1, houses + 1)), repeat=attributes)
            every = [dict(zip(values, itertools.chain(*row))) for row in rows]
            assert sum(fits(at, clues) for at in every) == 1
            assert all(sum(fits(at, [c for c in clues if c != out]) for at in every) > 1 for out in clues)


def test_a_return_is_the_share_of_right_cells_in_the_last_line_about_each_house(tmp_path):
    game, grid = task("zebra-2x2", 2), {"header": ["House", "Name", "Pet"], "rows": [["1", "Al", "cat"]]}
    (problem,) = problems(game, 1, 0)
    a, b = problem.answer.split("; ")
    for texts, share in (([a, b], 1), ([f"**{a.upper()}**.", f"So: {b}"], 1), ([a], 0.5), ([""], 0),
                         ([a, b, a.replace("1", "2")], 0.5), (["House 1:", b + ", x"], 0.5)):  # fmt: skip
        assert game.grade(problem, said(*texts)) == share, texts
    assert game.answer(said(b, a)).lower() == problem.answer.lower() and game.answer(said("?")) is None
    for agents in range(1, 9):
        game = task("zebra", agents)
        for shown in game.demonstrations(5, rng.generator(0)):
            assert len(shown.messages) == agents and game.grade(shown.problem, said(*shown.messages)) == 1

    (file := tmp_path / "f").write_text(line := json.dumps({"id": 1, "puzzle": "Who?", "solution": grid}))
    exam = accuracy.prepare(accuracy.Exam("", Config(task="zebra", model="x")), None, None, str(file))
    assert exam.problems[0].answer == "House 1: Al, cat" and exam.task.is_held_out(exam.problems[0].text)
    for old, new, fault in ("Al", "___", "blank"), ("rows", "lines", "has no"), ('"cat"', "3", "has no"):
        file.write_text(line.replace(old, new))
        assert fault in refusal(task, "zebra", 2, data=str(file))
