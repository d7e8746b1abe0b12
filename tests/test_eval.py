"""avg@k, unbiased pass@k and their intervals."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from teamtr_min import load_model, save_model
from teamtr_min.bench.accuracy import pass_at, pick
from teamtr_min.config import Config
from teamtr_min.hf.weights import RELAY
from teamtr_min.rollout import Rollouts
from teamtr_min.tasks import Problem, Relay, WordProblems
from teamtr_min.team import Message
from teamtr_min.theory.certificate import mean_with_interval

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K" / "hf_qwen2"


def test_pass_at_j_is_the_share_of_all_choices_of_j_that_hold_a_right_one():
    drawn = 6
    for right in range(drawn + 1):
        outcomes = [1] * right + [0] * (drawn - right)
        for j in range(1, drawn + 1):
            choices = [max(c) for c in itertools.combinations(outcomes, j)]
            wanted = sum(choices) / len(choices)
            assert pass_at(torch.tensor([right]), drawn, j).item() == pytest.approx(wanted)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    g = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        mean, (low, high) = mean_with_interval(
            torch.from_numpy(g.random(100) < 0.3), seed=trial, resamples=300
        )
        covered += low <= 0.3 <= high
        assert low <= mean <= high
    assert 0.88 < covered / 200 < 0.99


def test_json_prints_one_object_with_the_promised_fields(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--agents", "2", "--problems", "20", "--k", "3", "--device", "cpu"]
    assert evaluation.main(["relay", "--json", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in (
        "benchmark",
        "mode",
        "k",
        "problems",
        "avg_at_k",
        "pass_at_k",
        "avg_at_k_ci",
        "pass_at_k_ci",
    ):
        assert name in result
    assert result["problems"] == 20 and result["k"] == 3 and result["avg_at_k"] <= result["pass_at_k"]
    data = tmp_path / "p.jsonl"
    data.write_text('{"problem": "7+8*3", "answer": "5"}\n{"problem": "1+1-1", "answer": "impossible"}\n')
    assert (
        evaluation.main(["relay", "--json", "--data", str(data), *flags[:2], "--k", "40", "--device", "cpu"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["problems"] == 2 and result["pass_at_k"] == 0.5 and 0 < result["avg_at_k"] < 0.5


def test_the_agents_that_are_evaluated_are_those_of_the_run(capsys, tmp_path, monkeypatch):
    """A run whose last agent is deaf scores 0; and without --team the newest run is taken."""
    monkeypatch.chdir(tmp_path)
    for name in ("older", "newer"):
        flags = "--agents 2 --stages 1 --problems 2 --group 2 --inner-steps 1 --eval-problems 8 --device cpu"
        assert train.main([*flags.split(), "--out", f"runs/{name}"]) == 0
    model = load_model("runs/newer/agents/1")
    model.model.norm.weight.data.zero_()  # every token equally likely
    save_model(model, "runs/newer/agents/1")
    os.utime("runs/older/summary.json", (0, 0))
    scores = []
    for flags in (["--team", "runs/older"], ["--team", "runs/newer"], []):
        capsys.readouterr()
        assert evaluation.main(["--json", "--problems", "200", *flags]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["avg_at_k"] > 0.1 and scores[1]["avg_at_k"] < 0.05
    assert scores[2]["team"] == "runs/newer" and scores[2]["avg_at_k"] == scores[1]["avg_at_k"]
    for name, text in (("broken", "{"), ("other", json.dumps({"task": "convention"}))):  # newer, not of relay
        (tmp_path / "runs" / name / "agents").mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text("{}")
        (tmp_path / "runs" / name / "config.json").write_text(text)
    assert evaluation.main(["relay", "--json", "--problems", "200"]) == 0
    assert json.loads(capsys.readouterr().out)["team"] == "runs/newer"


def test_the_command_that_a_run_prints_last_works_for_every_task(capsys, tmp_path, monkeypatch):
    """A run on a task of one's own, and on a JSONL file: evaluated on its own task and data, named or not."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"question": f"{i % 10}+{i // 10}", "answer": "?"}) for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    source = "import teamtr_min.tasks as t\ndef task(config):\n    return t.Relay(config)\n"
    (tmp_path / "mine.py").write_text(source)
    toy = (
        "--agents 2 --stages 1 --problems 2 --group 2 --inner-steps 1 --eval-problems 8 --device cpu".split()
    )
    for task, more in (("mine.py", []), ("jsonl", ["--data", "sums.jsonl"])):
        if task == "jsonl":  # the shipped model's template passes over the English roles
            monkeypatch.setattr(
                "teamtr_min.tasks.WordProblems.roles", lambda self, n: Relay(Config()).roles(n)
            )
        assert train.main([*toy, "--task", task, *more]) == 0
        words = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python eval.py ").split()
        assert words[0] == task and evaluation.main([*words, "--json", "--problems", "4"]) == 0
        named = json.loads(capsys.readouterr().out)
        assert evaluation.main(["--team", words[2], "--k", "4", "--json", "--problems", "4"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert named["benchmark"] == plain["benchmark"] == task and named["avg_at_k"] == plain["avg_at_k"]
    assert evaluation.main(["jsonl", "--agents", "2"]) == 2
    assert "--task jsonl needs --data" in capsys.readouterr().err


def test_another_model_is_evaluated_with_the_defaults_that_train_uses():
    assert Config.of({"model": "x"}).temperature == 0.8 and Config.of({"model": "x"}).max_new_tokens == 256
    assert Config.of({"model": "relay,relay", "agents": 2}) == Config(model="relay,relay", agents=2)


@pytest.mark.skipif(not STORIES.is_dir(), reason="a model that reads English is not at hand (../shared/data)")
def test_word_problems_of_a_file_are_all_evaluated(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"ask": f"{i} + {i}?", "gold": f"so #### {2 * i}"}) for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    flags = [
        "--model",
        str(STORIES),
        "--agents",
        "2",
        "--data",
        str(tmp_path / "p.jsonl"),
        "--max-new-tokens",
        "4",
    ]
    fields = ["--question-field", "ask", "--answer-field", "gold"]
    assert evaluation.main(["jsonl", "--json", *flags, *fields]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "jsonl" and result["problems"] == 5 and result["avg_at_k"] == 0
    assert evaluation.main(["jsonl", "--json", *flags]) == 2
    assert 'line 1: no text in the field "question" (it has: ask, gold)' in capsys.readouterr().err


def test_the_table_shows_three_transcripts(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no runs here: the shipped team
    assert evaluation.main(["--problems", "8", "--k", "4", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("untrained team", "avg@4", "pass@1", "pass@2", "pass@4"))
    assert text.count("(answer ") == 3 and text.count("\n  A: ") == 3


def fake_rollouts(answers: list[list[str]], sure: list[list[float]]) -> Rollouts:
    """One message per rollout; `sure` is its mean log-prob per token. "1" is right."""
    messages = [
        [Message(0, [1] * n, text, [value] * n, True)]
        for texts, values in zip(answers, sure)
        for n, (text, value) in enumerate(zip(texts, values), start=1)
    ]
    returns = torch.tensor([float(text == "1") for texts in answers for text in texts])
    problems = [Problem("", "", "1")] * len(messages)
    group = len(answers[0])
    return Rollouts(None, problems, messages, returns, group, 0.0, [0] * len(messages), returns * 0)


def test_a_vote_takes_the_answer_of_most_and_the_first_of_equals():
    task = Relay(Config(agents=1))
    votes = [["1", "2", "2"], ["2", "1", "1"], ["1", "2", "3"], ["3", "2", "1"]]
    rollouts = fake_rollouts(votes, [[-1.0] * 3] * 4)
    assert pick(rollouts, "vote", task).tolist() == [0, 1, 1, 0]


def test_best_of_takes_the_likeliest_per_token_whatever_its_length_and_return():
    rollouts = fake_rollouts([["1", "2", "2"], ["2", "2", "1"]], [[-0.5, -0.2, -0.9], [-3.0, -2.0, -1.0]])
    assert pick(rollouts, "best_of", None).tolist() == [0, 1]


def test_equal_answers_are_one_answer_to_a_vote(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    task = WordProblems(Config(task="jsonl", data=str(tmp_path / "p.jsonl")))
    said = [
        "#### 1,234.50",
        "the answer is $1234.5",
        r"\boxed{\frac{2469}{2}}",
        "#### $X + y$",
        r"\boxed{x+y.}",
        "no",
    ]
    answers = [task.answer([Message(0, [], text, [], True)]) for text in said]
    assert answers[0] == answers[1] == answers[2] != answers[3] == answers[4] and answers[5] is None


def test_solo_takes_the_teams_turns_and_as_many_tokens(capsys, tmp_path, monkeypatch):
    """A copy of the same model taking all turns spends what the team does."""
    monkeypatch.chdir(tmp_path)
    flags = ["relay", "--agents", "3", "--problems", "40", "--device", "cpu", "--k", "2", "--json"]
    assert evaluation.main([*flags, "--mode", "solo"]) == 0
    result = json.loads(capsys.readouterr().out)
    equal = result["equal_tokens"]
    assert equal["rollouts_per_problem"] == [2, 2] and equal["difference"] == equal["team"] - equal["solo"]
    assert equal["tokens_per_problem"][0] == pytest.approx(equal["tokens_per_problem"][1], rel=0.1)
    assert evaluation.main([*flags, "--mode", "vote", "--k", "1"]) == 2
    assert "--k of at least 2" in capsys.readouterr().err
    own = "import teamtr_min.tasks as t\nclass Mine(t.Relay):\n    answer = None\n"
    (tmp_path / "mine.py").write_text(own + "    def grade(self, problem, messages):\n        return 0.0\n")
    (tmp_path / "mine.py").open("a").write("def task(config):\n    return Mine(config)\n")
    assert evaluation.main(["mine.py", *flags[1:], "--mode", "solo"]) == 2  # before anything is sampled
    assert "a method answer" in capsys.readouterr().err
    assert evaluation.main(["mine.py", *flags[1:], "--mode", "solo", "--k", "1"]) == 0


def test_results_are_kept_with_what_they_were_read_from(capsys, tmp_path, monkeypatch):
    """Each call appends a line; its hash is of the weights: one changed number, another hash."""
    monkeypatch.chdir(tmp_path)
    model = load_model("relay")
    save_model(model, "a")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / file).write_text((RELAY / file).read_text())
    flags = ["relay", "--model", "a", "--agents", "2", "--problems", "8", "--device", "cpu", "--show", "0"]
    for seed in ("3", "3", "4"):
        assert evaluation.main([*flags, "--seed", seed]) == 0
    model.model.norm.weight.data[0] += 1e-3
    save_model(model, "a")
    assert evaluation.main(flags) == 0
    lines = [json.loads(line) for line in Path("runs/eval.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [3, 3, 4, 0]
    assert lines[0]["avg_at_k"] == lines[1]["avg_at_k"]
    hashes = [line["model_hash"] for line in lines]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["chess"], "no benchmark chess"),
        (["--k", "0"], "must be at least 1"),
        (["--team", "nowhere"], "nowhere/config.json: No such file"),
        (["--team", "x", "--agents", "2"], "leave out --agents"),
        (["--agents", "2", "--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    ],
)
def test_bad_input_is_a_sentence(capsys, flags, message):
    assert evaluation.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
