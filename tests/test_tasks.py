"""Relay arithmetic: right answers, and a split that nothing crosses."""

import pytest

from teamtr_min import rng
from teamtr_min.config import UserError
from teamtr_min.tasks import Relay, load_task, read_problems
from teamtr_min.team import Message


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
    for problem in Relay(turns).draw(200, rng.generator(0, turns)):
        assert len(problem.text) == 2 * turns + 1 and problem.answer == by_hand(problem.text)


def test_the_held_out_split_never_overlaps_training():
    for turns in (1, 2, 3, 5):
        task = Relay(turns)
        trained = {p.text for seed in range(5) for p in task.draw(500, rng.generator(seed, "problems", 0))}
        held_out = {p.text for p in task.draw(2048, rng.generator(0, "held-out"), held_out=True)}
        assert trained and held_out and not trained & held_out
    chains = [f"{a}{s}{b}" for a in range(10) for s in "+-*" for b in range(10)]
    assert 15 < sum(map(Relay.is_held_out, chains)) < 45, "about a tenth"


def test_only_the_last_message_counts():
    (problem,) = Relay(2).draw(1, rng.generator(0))
    wrong = str((int(problem.answer) + 1) % 10)
    grade = Relay(2).grade
    assert grade(problem, said("nonsense", problem.answer)) == 1
    assert grade(problem, said(problem.answer, wrong)) == 0
    assert grade(problem, said(problem.answer, "")) == 0
    assert grade(problem, said(problem.answer, problem.answer * 2)) == 0


def test_too_many_turns_and_unknown_tasks_are_refused():
    with pytest.raises(UserError, match="at most 8 operations.*9 turns"):
        load_task("relay", 9)
    with pytest.raises(UserError, match="no task 'chess'"):
        load_task("chess", 3)


def test_problem_files_are_read_and_their_faults_located(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "7+8", "answer": 5}\n\n{"problem": "1*1", "answer": "1", "id": "x"}\n')
    assert [(p.id, p.text, p.answer) for p in read_problems(file)] == [("1", "7+8", "5"), ("x", "1*1", "1")]
    for line, fault in (
        ('{"problem": "1"', "not JSON"),
        ('{"problem": "1"}', '"answer"'),
        ("[1]", '"problem"'),
    ):
        file.write_text('{"problem": "7+8", "answer": "5"}\n' + line + "\n")
        with pytest.raises(UserError, match=f"p.jsonl, line 2: .*{fault}"):
            read_problems(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="no problems"):
        read_problems(file)
    with pytest.raises(UserError, match="cannot read"):
        read_problems(tmp_path / "absent.jsonl")
