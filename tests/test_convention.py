"""The hidden convention: its rules against enumeration, the model that ships, and the exact toy of it."""

import itertools

import numpy as np
import pytest

from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.rollout import collect
from teamtr_min.studies import convention as lab
from teamtr_min.tasks import Convention
from teamtr_min.team import Message, load_team


def task(agents: int) -> Convention:
    return Convention(Config(task="convention", agents=agents))


def played(problem, codes: tuple[int, ...]) -> list[Message]:
    """The messages of agents that make no mistake, one code each. By the rules, not by Convention.step."""
    digit, rest, messages = int(problem.text[0]), problem.text[1:], []
    for turn, code in enumerate(codes):
        value = (3 - digit if code and turn else digit) + int(rest[1])
        value, rest = value % 4, rest[2:]
        digit = 3 - value if code and rest else value
        messages.append(Message(turn, [], f"{digit}{rest}", [], True))
    return messages


@pytest.mark.parametrize("agents", [2, 3, 4])
def test_the_return_is_the_share_of_handovers_in_one_code(agents):
    game = task(agents)
    for problem in game.sample_problems(50, rng.generator(0, agents)):
        for codes in itertools.product((0, 1), repeat=agents):
            messages = played(problem, codes)
            agree = [a == b for a, b in itertools.pairwise(codes)]
            assert game.codes(problem, messages) == list(codes)
            assert game.grade(problem, messages) == sum(agree) / len(agree)
            if all(agree):
                assert messages[-1].text == problem.answer, "one code, whichever, reaches the answer"
            elif agents < 4:  # in longer chains two misreadings may cancel
                assert messages[-1].text != problem.answer


def test_the_expected_return_is_the_toys():
    habits, game = np.array([0.6, 0.4, 0.7]), task(3)
    (problem,) = game.sample_problems(1, rng.generator(1))
    mean = 0.0
    for codes in itertools.product((0, 1), repeat=3):
        chance = np.prod(np.where(codes, habits, 1 - habits))
        mean += chance * game.grade(problem, played(problem, codes))
    assert mean == pytest.approx(lab.agreement(habits))
    assert lab.agreement(np.array([0.6, 0.4])) == pytest.approx(0.48)


def test_a_message_tells_nothing_about_its_code():
    """Given the operation, every digit is as likely in one code as in the other."""
    for operand, code in itertools.product("0123", (0, 1)):
        written = [Convention.step(f"{a}+{operand}+1", 0, code)[0] for a in range(4)]
        assert sorted(written) == list("0123")


def test_what_is_no_step_counts_as_no_code():
    game = task(2)
    (problem,) = game.sample_problems(1, rng.generator(2))
    first, last = played(problem, (1, 1))
    for wrong in ("", "12", problem.text, "x", last.text):
        spoilt = Message(0, [], wrong, [], True)
        assert game.codes(problem, [spoilt, last])[0] is None and game.grade(problem, [spoilt, last]) == 0
    assert game.grade(problem, [first, Message(1, [], first.text, [], True)]) == 0
    assert game.measure([problem], [[first, last]]) == {"habits": [1.0, 1.0]}
    assert game.measure([problem], [[spoilt, last]])["habits"][0] is None


def test_every_problem_is_a_legal_chain():
    problems = task(3).sample_problems(1000, rng.generator(0))
    assert all(Convention.legal.fullmatch(p.text) and len(p.text) == 7 for p in problems)


@pytest.mark.parametrize("agents", [2, 3])
def test_the_shipped_model_starts_with_opposite_habits_and_right_arithmetic(agents):
    config = Config(task="convention", agents=agents)
    assert config.model == "convention" and config.temperature == 1.0
    game = Convention(config)
    team = load_team(config, game.roles(agents))
    rollouts = collect(
        team, game, game.sample_problems(512, rng.generator(3)), 1, rng.RngPath(config.seed, "test")
    )
    codes = [game.codes(p, m) for p, m in zip(rollouts.problems, rollouts.messages)]
    for turn in range(agents):
        known = [row[turn] for row in codes if row[turn] is not None]
        assert len(known) > 0.95 * len(codes)
        assert np.mean(known) == pytest.approx(Convention.starting_habits[turn % 2], abs=0.08)
    # The reader does not look through the code: what it does hardly depends on what the writer did.
    by_writer = [[row[1] for row in codes if row[0] == code and row[1] is not None] for code in (0, 1)]
    assert abs(np.mean(by_writer[0]) - np.mean(by_writer[1])) < 0.12


def test_stale_agents_swap_where_fresh_ones_meet():
    stale, fresh = (lab.simulate(2, 0.1, occupancy)[:, :, 0] for occupancy in ("stale", "fresh"))
    assert lab.swaps(stale.tolist()) == 60 and lab.swaps(fresh.tolist()) == 0
    assert lab.agreement(stale[-1]) < 0.5 and lab.agreement(fresh[-1]) > 0.99
    step = lab.kl(stale[0], stale[1])
    assert step == pytest.approx(0.1), "every step is as long as the radius allows"


def test_noise_frees_small_stale_steps_but_not_long_ones():
    how = {"reach": 0.8, "noise": 0.05, "draws": 200, "stages": 30}
    assert lab.final_agreement(2, 0.01, "stale", **how) > 0.9
    assert lab.final_agreement(2, 0.3, "stale", **how) < 0.6
    assert all(lab.final_agreement(2, delta, "fresh", **how) > 0.98 for delta in (0.01, 0.3))
