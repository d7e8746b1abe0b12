"""A team from a run or from models: to talk to, to look into, with roles, tools and private views."""

import json

import pytest
import torch
from ready import team_of
from tiny import refusal, write_tokenizer

import teamtr_min
from teamtr_min.engine import rng
from teamtr_min.hf.weights import RELAY
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Relay
from teamtr_min.tasks.task import Problem, Role


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run's agents and configuration, without any training."""
    directory = tmp_path_factory.mktemp("run")
    config, team = team_of(agents=2, rounds=2, temperature=0.9)
    with torch.no_grad():
        for p in team.agents[1].model.parameters():
            p.mul_(0.9)
    config.save(directory / "config.json")
    team.save(directory / "agents")
    return directory


def test_a_run_comes_back_as_the_team_that_it_was(run):
    team = teamtr_min.load_team(run)
    _, fresh = team_of(agents=2, rounds=2)
    assert (team.turns, team.temperature, [a.role.name for a in team.agents]) == (4, 0.9, ["A", "B"])
    weights = [agent.model.head for agent in team.agents]
    assert torch.equal(weights[0], fresh.agents[0].model.head)
    assert torch.equal(weights[1], 0.9 * fresh.agents[1].model.head)


def test_solve_is_repeatable_and_says_who_said_what(run):
    team = teamtr_min.load_team(run)
    answers = team.solve("7+8*3-4+1", samples=3, seed=1)
    assert answers == team.solve("7+8*3-4+1", samples=3, seed=1) != team.solve("7+8*3-4+1", samples=3, seed=2)
    assert [(m.agent, m.name) for m in answers[0].messages] == [(0, "A"), (1, "B")] * 2
    assert all(answer.answer == answer.messages[-1].text.strip() for answer in answers)
    greedy = team.solve("7+8*3-4+1", samples=2, temperature=0.0)
    assert greedy[0] == greedy[1] and team.temperature == 0.9


def test_a_list_of_models_is_a_team_with_roles_that_are_given_or_of_word_problems_or_of_a_file(tmp_path):
    team = teamtr_min.load_team([RELAY, RELAY], roles=["Add.", {"name": "Zoe", "system": "Check."}])
    assert [(a.role.name, a.role.system) for a in team.agents] == [("Agent 1", "Add."), ("Zoe", "Check.")]
    assert len(teamtr_min.load_team([RELAY] * 3, max_new_tokens=5).solve("1+2", samples=2)[0].messages) == 3

    file, roles = tmp_path / "roles.json", [Role("X", "Go."), Role("Y", "Stop.")]
    file.write_text(json.dumps([{"name": role.name, "system": role.system} for role in roles]))
    assert [a.role for a in team_of(agents=2, roles=str(file))[1].agents] == roles
    assert "has 2 roles for 3 agents" in refusal(team_of, agents=3, roles=str(file))
    for wrong in ('[{"nome": "X"}]', "[1]", '[{"name": "X", "system": 2}]'):
        file.write_text(wrong)
        assert "not a JSON list" in refusal(team_of, agents=1, roles=str(file))


class Odd(Relay):
    """The second agent is a tool, and only the first agent sees the problem."""

    def roles(self, agents: int) -> list[Role]:
        roles = super().roles(agents)
        roles[1] = Role("B", "", tool=lambda problem, messages: f"{messages[-1].text}+{problem.text}")
        return roles

    def view(self, problem: Problem, agent: int) -> str:
        return problem.text if agent == 0 else "0"


def test_a_tool_takes_turns_without_a_model_and_an_agent_sees_its_own_view_of_the_problem():
    config, plain = team_of(agents=3)
    team, problem = build_team(config, Odd(config)), Problem("", "1+2+3+4", "")
    messages, others = (t.take_turns([problem] * 4, rng.RngPath(0, "x")) for t in (team, plain))
    assert team.agents[1].model is None
    assert [row[0] for row in others] == [row[0] for row in messages]
    for row in messages:
        assert [m.agent for m in row] == [0, 1, 2] and not row[1].tokens
        assert row[1].text == f"{row[0].text}+{problem.text}"
        seen = team.agents[2].tokenizer.decode(team.render(2, problem, row[:2], True).ids)
        assert f"B:\n{row[1].text}" in seen
    for j, text in ((0, problem.text), (2, "0")):
        assert team.render(j, problem, [], True) == plain.render(j, Problem("", text, ""), [], True)


def test_a_model_with_fewer_embeddings_than_its_tokenizer_has_tokens_is_refused(tmp_path):
    teamtr_min.save_model(teamtr_min.load_model(RELAY), tmp_path)
    write_tokenizer(tmp_path)
    words = "the tokenizer has 262 tokens, but the model only"
    assert words in refusal(team_of, model=str(tmp_path), task="relay")
