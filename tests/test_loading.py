"""A team from a run or from models: to talk to, to look into, with roles, tools and private views."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from ready import team_of
from tiny import random_model, refusal, said, write_tokenizer
from toy_runs import evaluate

import teamtr_min
import train
from teamtr_min.engine import rng
from teamtr_min.extras.warm_start import as_rollouts
from teamtr_min.files import function_from_file
from teamtr_min.hf.weights import RELAY
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Relay, load_task, tools
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


def test_a_run_comes_back_as_the_team_that_it_was_and_solves_repeatably(run):
    team = teamtr_min.load_team(run)
    _, fresh = team_of(agents=2, rounds=2)
    assert (team.turns, team.temperature, [a.role.name for a in team.agents]) == (4, 0.9, ["A", "B"])
    weights = [agent.model.head for agent in team.agents]
    assert torch.equal(weights[0], fresh.agents[0].model.head)
    assert torch.equal(weights[1], 0.9 * fresh.agents[1].model.head)
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
    for wrong in ('[{"nome": "X"}]', '{"X": "Go."}', "[1]", '[{"name": "X", "system": 2}]'):
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


@pytest.mark.parametrize("text, answer", [
    ("<<12*3>> and <<37+48>>", "36, 85"), ("<<8/2=4>>4", "4"), ("<<(3-4)*0.5>><<2/3>>", "-0.5, 0.6666666667"),
    ("12*3 = 36", ""), ("<<1/0>> <<a>> <<9**9**9>>", "?, ?, ?"), ("<<abs(1)>>", "?"), ("<<" * 10**5, ""),
    ("<<" + "9" * 10**5 + ">>", ""), (f"<<{'(' * 99}>><<{'9' * 99}>>", "?, ?"), ("<<1>>" * 10**4, "1, 1, 1"),
])  # fmt: skip
def test_the_calculator_is_exact_and_hostile_texts_neither_last_nor_break_it(text, answer):
    begin = time.perf_counter()
    assert tools.calculator(Problem("", "", ""), said("<<5>>", text)) == answer
    assert time.perf_counter() - begin < 1 and len(answer) <= tools.LONGEST


def test_tools_answer_after_turns_count_as_none_and_speak_for_themselves(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = random_model("llama", vocab_size=262, max_positions=2048)
    teamtr_min.save_model(model, write_tokenizer(tmp_path))
    team = teamtr_min.load_team(["."] * 2, task="sums-99", tools="calculator", device="cpu")
    task = load_task(teamtr_min.Config(task="sums-99", agents=2, tools="calculator"))
    rollouts = as_rollouts(team, task.demonstrations(9, rng.generator(0)))
    for problem, row in zip(rollouts.problems, rollouts.messages):
        assert [m.agent for m in row] == [0, 2, 1, 2] and task.grade(problem, row) == 1
        assert row[2].text.startswith(f"<<{row[1].text}") and not row[1].tokens
    even = Role("X", "", lambda problem, messages: "even" * (len(messages[-1].text) % 2 == 0))
    monkeypatch.setitem(tools.TOOLS, "calculator", even)
    flags = "sums --model . --agents 2 --rounds 2 --tools calculator --max-new-tokens 5 --problems 8"
    for mode, agents in (("team", [0, 1, 0, 1]), ("solo", [0, 0, 0, 0])):
        evaluate(capsys, *flags.split(), "--samples", "s", "--mode", mode)
        for row in (json.loads(line)["messages"] for line in Path("s").read_text().splitlines()):
            assert [m["agent"] for m in row if m["agent"] < 2] == agents
            for m, after in zip(row, [*row[1:], {"agent": 0}]):
                assert (after["agent"] == 2) == (m["agent"] < 2 and len(m["text"]) % 2 == 0)
    assert "no tool 'x': give calculator" in refusal(tools.with_tools, [], "calculator, x")
    assert "must return a text" in refusal(tools.spoken, 0, Role("X", "", lambda *_: None), None, [])

    page = (Path(__file__).parents[1] / "docs/tasks.md").read_text()
    for name, code in zip(("library.py", "guess.py"), re.findall(r"```python\n(.*?)```", page, re.S)):
        Path(name).write_text(code)
    Path("q.jsonl").write_text("".join(f'{{"question": "{i}?", "answer": "Italy"}}\n' for i in range(60)))
    toy = "--model . --stages 1 --problems 3 --group 2 --eval-problems 3 --max-new-tokens 4".split()
    for flags in ("library.py --agents 3 --data q.jsonl --diagnostics", "guess.py --agents 2 --rounds 3"):
        assert train.main([*toy, "--out", flags[:3], "--task", *flags.split()]) == 0
    number, played = Problem("", "", "9"), []
    for text in ("x", "7", "9", "10"):
        played += said(text, function_from_file("guess.py", "referee")(number, said(text)))
    assert [m.text for m in played[1::2]] == ["Write a number.", "higher", "right", "lower"]
    assert function_from_file("guess.py", "task")(None).grade(number, played) == 0.5
