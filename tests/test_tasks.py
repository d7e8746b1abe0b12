"""Relay arithmetic: right answers, and a split that nothing crosses."""

import json
from pathlib import Path

import pytest

from teamtr_min import rng
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.tasks import Relay, extract_answer, is_correct, load_task, number, read_problems
from teamtr_min.team import Message

SHARED = Path(__file__).parents[2] / "shared" / "data"


def relay(turns: int) -> Relay:
    return Relay(Config(agents=turns))


def said(*texts: str) -> list[Message]:
    return [Message(0, [], text, [], True) for text in texts]


def by_hand(chain: str) -> str:
    """Left to right, modulo 10, without the task's own step function."""
    value = int(chain[0])
    for sign, digit in zip(chain[1::2], chain[2::2]):
        value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[sign]
    return str(value % 10)


def test_one_step_carries_out_the_first_operation():
    assert Relay.step("7+8*3-4") == "5*3-4" and Relay.step("5*3-4") == "5-4" and Relay.step("2-7") == "5"


@pytest.mark.parametrize("turns", [1, 2, 3, 8])
def test_answers_are_right_and_chains_have_one_operation_per_turn(turns):
    for problem in relay(turns).sample_problems(200, rng.generator(0, turns)):
        assert len(problem.text) == 2 * turns + 1 and problem.answer == by_hand(problem.text)


def test_the_held_out_split_never_overlaps_training():
    for turns in (1, 2, 3, 5):
        task = relay(turns)
        trained = {
            p.text for seed in range(5) for p in task.sample_problems(500, rng.generator(seed, "problems", 0))
        }
        held_out = {p.text for p in task.sample_problems(2048, rng.generator(0, "held-out"), held_out=True)}
        assert trained and held_out and not trained & held_out
    chains = [f"{a}{s}{b}" for a in range(10) for s in "+-*" for b in range(10)]
    assert 15 < sum(map(Relay.is_held_out, chains)) < 45, "about a tenth"


def test_only_the_last_message_counts():
    (problem,) = relay(2).sample_problems(1, rng.generator(0))
    wrong = str((int(problem.answer) + 1) % 10)
    grade = relay(2).grade
    assert grade(problem, said("nonsense", problem.answer)) == 1
    assert grade(problem, said(problem.answer, wrong)) == 0
    assert grade(problem, said(problem.answer, "")) == 0
    assert grade(problem, said(problem.answer, problem.answer * 2)) == 0


def test_too_many_turns_and_unknown_tasks_are_refused():
    with pytest.raises(UserError, match="at most 8 operations.*9 turns"):
        relay(9)
    with pytest.raises(UserError, match="no task 'chess'"):
        load_task(Config(task="chess"))
    with pytest.raises(UserError, match="relay makes its own problems"):
        load_task(Config(data="x.jsonl"))


def test_problem_files_are_read_and_their_faults_located(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"q": "7+8", "a": 5}\n\n{"q": "1*1", "a": "so #### 1", "id": "x"}\n')
    problems = read_problems(file, "q", "a")
    assert [(p.id, p.text, p.answer) for p in problems] == [("1", "7+8", "5"), ("x", "1*1", "1")]
    faults = (
        ('{"q": "1"', "not JSON"),
        ('{"q": "1", "b": 2}', 'no text in the field "a" .it has: q, b.; --question-field'),
        ('{"q": null, "a": 1}', 'no text in the field "q"'),
        ("[1]", "a JSON list, not an object"),
    )
    for line, fault in faults:
        file.write_text('{"q": "7+8", "a": "5"}\n' + line + "\n")
        with pytest.raises(UserError, match=f"p.jsonl, line 2: {fault}"):
            read_problems(file, "q", "a")
    file.write_text("\n")
    with pytest.raises(UserError, match="no problems"):
        read_problems(file, "q", "a")
    with pytest.raises(UserError, match="cannot read"):
        read_problems(tmp_path / "absent.jsonl", "q", "a")


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"first \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} but then #### 8", "8"),
        ("#### 8\nThe answer is 9.", "9"),
        ("The answer is: $1,234.50. Good.", "$1,234.50"),
        ("the final ANSWER is 3.5 metres", "3.5 metres"),
        (r"The answer is \boxed{12}.", "12"),
        (r"\boxed{unbalanced", None),
        ("it is 5", None),
        ("", None),
    ],
)
def test_the_last_stated_answer_counts(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "given, wanted, same",
    [
        ("1,234.50", "1234.5", True),
        ("$18", "18", True),
        ("18 dollars", "18", True),
        ("18.00", "18", True),
        ("50%", "50", True),
        (r"50\%", "50", True),
        ("-3", "\N{MINUS SIGN}3", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", False),
        (r"\frac{1}{2}", "0.5", True),
        ("0.1", "0.10000000000000001", False),
        ("10000000000000001", "10000000000000000", False),
        ("12,34", "1234", False),
        ("18", "81", False),
        ("18", "-18", False),
        ("1/0", "0", False),
        (r"x = \text{even}", r"x=\text{ even}", True),
        (r"(1, 2)", "(1,2)", True),
        ("blue", "red", False),
        (r"12\text{ cm}", "12", True),
    ],
)
def test_numbers_are_compared_exactly_and_other_answers_as_text(given, wanted, same):
    assert is_correct(f"so \\boxed{{{given}}}", wanted) == same
    assert is_correct(f"#### {given}", wanted) == same


def test_a_response_without_an_answer_is_wrong():
    assert not is_correct("18", "18") and not is_correct("", "")


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="GSM8K is not at hand (../shared/data/gsm8k)")
def test_every_gold_solution_of_gsm8k_is_right_and_its_neighbours_is_not():
    records = [json.loads(line) for side in ("train", "test")
               for line in (SHARED / "gsm8k" / f"{side}.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(records) == 8792
    for record, other in zip(records, records[1:] + records[:1]):
        gold, wrong = (r["answer"].split("####")[1].strip().replace(",", "") for r in (record, other))
        assert is_correct(record["answer"], gold)
        assert is_correct(other["answer"], gold) == (gold == wrong)
    task = load_task(Config(task="gsm8k", data=str(SHARED / "gsm8k")))
    assert (len(task.train), len(task.held_out)) == (7473, 1319)
    assert all(number(p.answer) is not None for p in task.train + task.held_out)


@pytest.mark.skipif(not (SHARED / "math").is_dir(), reason="MATH is not at hand (../shared/data/math)")
def test_gold_solutions_of_math_are_right():
    records = [json.loads(line) for line in (SHARED / "math" / "train.jsonl").read_text().splitlines()]
    assert sum(is_correct(r["solution"], r["answer"]) for r in records) / len(records) > 0.99


def test_word_problems_are_split_and_drawn_without_repetition(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(200))
    )
    task = load_task(Config(task="jsonl", data=str(file)))
    assert len(task.train) + len(task.held_out) == 200 and 8 <= len(task.held_out) <= 35
    drawn = [p.id for p in task.sample_problems(50, rng.generator(0, "problems", 0))]
    assert len(set(drawn)) == 50 and not set(drawn) & {p.id for p in task.held_out}
    assert drawn != [p.id for p in task.sample_problems(50, rng.generator(0, "problems", 1))]
    with pytest.raises(UserError, match="only .* to train on"):
        task.sample_problems(500, rng.generator(0))
    problem = task.train[0]
    assert task.grade(problem, said(f"\\boxed{{{problem.answer}}}", "I agree")) == 1
    assert task.grade(problem, said(f"\\boxed{{{problem.answer}}}", "no: \\boxed{-7}")) == 0
    assert task.grade(problem, said("hm", "hm")) == 0
    assert [r.name for r in task.roles(3)] == ["Agent 1", "Agent 2", "Agent 3"] and len(task.roles(1)) == 1


def test_a_task_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def task(config):\n    return object()\n")
    with pytest.raises(UserError, match="has no roles, draw, grade"):
        load_task(Config(task=str(file)))
    file.write_text("task = 3\n")
    with pytest.raises(UserError, match="`task` is not a function"):
        load_task(Config(task=str(file)))
    with pytest.raises(UserError, match="no usable function `task`"):
        load_task(Config(task=str(tmp_path / "absent.py")))
