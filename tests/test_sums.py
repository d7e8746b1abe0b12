"""The word problems that are made up here, and real models on them where one is at hand."""

import pytest
from tiny import real_model

from teamtr_min import load_tokenizer
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.tasks import Sums
from teamtr_min.team import Message


def sums(agents: int = 2, rounds: int = 1) -> Sums:
    return Sums(Config(task="sums", agents=agents, rounds=rounds))


def said(*texts: str) -> list[Message]:
    return [Message(0, [], text, [], True) for text in texts]


@pytest.mark.parametrize("agents", range(1, 7))
def test_a_story_tells_its_numbers_and_each_step_goes_on_from_the_one_before(agents):
    for shown in sums(agents).demonstrations(100, rng.generator(0, agents)):
        told = [int(word.strip(".")) for word in shown.problem.text.split() if word.strip(".").isdigit()]
        assert len(told) == agents + 1 and len(shown.messages) == agents
        total = told[0]
        for line, count in zip(shown.messages, told[1:]):
            a, sign, b, equals, result = line.split()
            assert int(a) == total and int(b) == count and equals == "="
            total += count if sign == "+" else -count
            assert int(result) == total and 1 <= total <= 15
        assert shown.problem.answer == str(total)
        assert sums(agents).grade(shown.problem, said(*shown.messages)) == 1


def test_no_training_problem_has_the_numbers_of_a_held_out_one():
    for agents in (1, 2, 6):
        sample = sums(agents).sample_problems
        trained = {p.id for seed in range(5) for p in sample(400, rng.generator(seed, "problems", 0))}
        trained |= {d.problem.id for d in sums(agents).demonstrations(400, rng.generator(0))}
        held_out = {p.id for p in sample(400, rng.generator(0, "held-out"), held_out=True)}
        assert trained and held_out and not trained & held_out


def test_the_number_that_the_last_message_ends_with_is_the_answer():
    (problem,) = sums().sample_problems(1, rng.generator(3))
    right = problem.answer
    for last in (right, f"9 + 1 = {right}", f"So it is {right}.", f"**{right}**\n"):
        assert sums().grade(problem, said("?", last)) == 1, last
    for last in ("", "none", f"{right} or so", f"1{right}", f"{right}0", f"-{right}", f"{right} = x"):
        assert sums().grade(problem, said(right, last)) == 0, last


def test_more_than_six_turns_are_refused():
    with pytest.raises(UserError, match="at most 6 steps"):
        sums(agents=4, rounds=2)


def test_messages_are_short_for_a_real_tokenizer():
    tokenizer = load_tokenizer(real_model())
    shown = sums(agents=6).demonstrations(50, rng.generator(0))
    assert max(len(tokenizer.encode(text)) for d in shown for text in d.messages) < 24
