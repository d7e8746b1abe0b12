"""Tasks: right answers, a held-out split that no training problem crosses, and faults that are located."""

import json
import time

import pytest

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.tasks import Relay, load_task, read_problems
from teamtr_min.team import Message


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
    assert [Relay.step(chain) for chain in ("7+8*3-4", "5*3-4", "2-7")] == ["5*3-4", "5-4", "5"]


def test_a_sum_is_read_from_the_end_in_linear_time():
    task = load_task(Config(task="sums"))
    texts = {"9" * 10**6 + "x": None, "1!" * 10**6 + "x": None, "12-34.\n": "-34", "it is 7": "7", "": None}
    begin = time.process_time()
    assert [task.answer(said(text)) for text in texts] == list(texts.values())
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("turns", [1, 2, 3, 8])
def test_answers_are_right_and_chains_have_one_operation_per_turn(turns):
    for problem in relay(turns).sample_problems(200, rng.generator(0, turns)):
        assert len(problem.text) == 2 * turns + 1 and problem.answer == by_hand(problem.text)


@pytest.mark.parametrize(
    "task, turns", [("relay", 1), ("relay", 2), ("relay", 3), ("relay", 5), ("convention", 3)]
)
def test_the_held_out_split_never_overlaps_training(task, turns):
    sample = load_task(Config(task=task, agents=turns)).sample_problems
    trained = {p.text for seed in range(5) for p in sample(500, rng.generator(seed, "problems", 0))}
    held_out = {p.text for p in sample(2048, rng.generator(0, "held-out"), held_out=True)}
    assert trained and held_out and not trained & held_out


def test_about_a_tenth_of_all_chains_is_held_out():
    chains = [f"{a}{sign}{b}" for a in range(10) for sign in "+-*" for b in range(10)]
    assert 15 < sum(map(Relay.is_held_out, chains)) < 45


def test_only_the_last_message_counts():
    (problem,) = relay(2).sample_problems(1, rng.generator(0))
    right, wrong = problem.answer, str((int(problem.answer) + 1) % 10)
    assert relay(2).grade(problem, said("nonsense", right)) == 1
    for last in (wrong, "", right * 2):
        assert relay(2).grade(problem, said(right, last)) == 0


@pytest.mark.parametrize(
    "given, fault",
    [
        ({"agents": 9}, "relay .* at most 8 operations.* 9 turns"),
        ({"task": "convention", "agents": 1}, "convention .* at least 2 .* 1 turns"),
        ({"task": "convention", "agents": 5}, "convention .* at most 4 operations.* 5 turns"),
        (
            {"task": "chess"},
            "no task 'chess': give relay, convention, sums, gsm8k, .*, jsonl, or FILE.py",
        ),
        ({"data": "x.jsonl"}, "relay makes its own problems"),
        ({"task": "jsonl"}, "jsonl needs --data"),
    ],
)
def test_impossible_choices_are_refused(given, fault):
    with pytest.raises(UserError, match=fault):
        load_task(Config(**given))


def test_problem_files_are_read(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"q": "7+8", "a": 5}\n\n{"q": "1*1", "a": "so #### 1", "id": "x"}\n')
    problems = read_problems(file, "q", "a")
    assert [(p.id, p.text, p.answer) for p in problems] == [("1", "7+8", "5"), ("x", "1*1", "1")]


@pytest.mark.parametrize(
    "line, fault",
    [
        ('{"q": "1"', "not JSON"),
        ('{"q": "1", "b": 2}', r'no text in the field "a" \(it has: q, b\); --question-field'),
        ('{"q": null, "a": 1}', 'no text in the field "q"'),
        ("[1]", "a JSON list, not an object"),
    ],
)
def test_a_fault_in_a_problem_file_is_located(tmp_path, line, fault):
    file = tmp_path / "p.jsonl"
    file.write_text('{"q": "7+8", "a": "5"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"p.jsonl, line 2: {fault}"):
        read_problems(file, "q", "a")


def test_a_problem_file_that_is_absent_or_empty_is_refused(tmp_path):
    file = tmp_path / "p.jsonl"
    with pytest.raises(UserError, match="cannot read"):
        read_problems(file, "q", "a")
    file.write_text("\n")
    with pytest.raises(UserError, match="no problems"):
        read_problems(file, "q", "a")


@pytest.fixture
def word_problems(tmp_path):
    lines = [json.dumps({"question": f"What is {i}?", "answer": str(i)}) for i in range(200)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return load_task(Config(task="jsonl", data=str(tmp_path / "p.jsonl")))


def test_word_problems_are_split_and_sampled_without_repetition(word_problems):
    held_out, sample = word_problems.held_out, word_problems.sample_problems
    assert len(word_problems.train) + len(held_out) == 200 and 8 <= len(held_out) <= 35
    first, second = ([p.id for p in sample(50, rng.generator(0, "problems", stage))] for stage in (0, 1))
    assert len(set(first)) == 50 and not set(first) & {p.id for p in held_out} and first != second
    with pytest.raises(UserError, match="only .* to train on"):
        sample(500, rng.generator(0))


def test_the_last_answer_that_any_message_states_is_the_teams(word_problems):
    problem = word_problems.train[0]
    right = f"\\boxed{{{problem.answer}}}"
    assert word_problems.grade(problem, said(right, "I agree")) == 1
    assert word_problems.grade(problem, said(right, "no: \\boxed{-7}")) == 0
    assert word_problems.grade(problem, said("hm", "hm")) == 0


def test_word_problems_have_a_role_for_each_agent(word_problems):
    assert [role.name for role in word_problems.roles(3)] == ["Agent 1", "Agent 2", "Agent 3"]
    assert [len(word_problems.roles(agents)) for agents in (1, 2)] == [1, 2]


@pytest.mark.parametrize(
    "source, fault",
    [
        ("task = lambda config: object()", "has no roles, sample_problems, grade"),
        ("class task:\n    def __init__(self, config): ...\n    def draw(self): ...", "rename it"),
        ("task = 3", "`task` is not a function"),
        ("", "no usable function `task`"),
    ],
)
def test_a_faulty_task_of_ones_own_is_refused(tmp_path, source, fault):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UserError, match=fault):
        load_task(Config(task=str(file)))


def test_an_absent_task_of_ones_own_is_refused():
    with pytest.raises(UserError, match="no usable function `task`"):
        load_task(Config(task="absent.py"))
