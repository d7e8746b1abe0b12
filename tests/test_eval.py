"""avg@k, unbiased pass@k and their intervals; which team, data and mode they are read from."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import evaluate, interrupt_at, refusal
from tiny import shared
from toy_runs import run

import eval as evaluation
from teamtr_min import load_model, save_model
from teamtr_min.bench import accuracy
from teamtr_min.bench.accuracy import find_subject, pass_at, pick
from teamtr_min.config import Config
from teamtr_min.extras.certificate import mean_with_interval
from teamtr_min.files import write_sums
from teamtr_min.hf.weights import RELAY
from teamtr_min.rollout import Rollouts
from teamtr_min.tasks import Problem, Relay, WordProblems
from teamtr_min.team import Message, load_team

PAIR = "--agents", "2", "--device", "cpu"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory without runs."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("right", range(7))
def test_pass_at_j_is_the_share_of_all_choices_of_j_that_hold_a_right_one(right):
    outcomes = [1] * right + [0] * (6 - right)
    for j in range(1, 7):
        choices = [max(c) for c in itertools.combinations(outcomes, j)]
        assert pass_at(torch.tensor([right]), 6, j).item() == pytest.approx(sum(choices) / len(choices))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    g, covered = np.random.default_rng(0), 0
    for trial in range(200):
        drawn = torch.from_numpy(g.random(100) < 0.3)
        mean, (low, high) = mean_with_interval(drawn, seed=trial, resamples=300)
        covered += low <= 0.3 <= high
        assert low <= mean <= high
    assert 0.88 < covered / 200 < 0.99


def test_json_prints_one_object_with_the_promised_fields(capsys):
    result = evaluate(capsys, "relay", *PAIR, "--problems", "20", "--k", "3")
    fields = {"benchmark", "mode", "k", "problems", "avg_at_k", "pass_at_k", "avg_at_k_ci", "pass_at_k_ci"}
    assert fields <= result.keys()
    assert result["problems"] == 20 and result["k"] == 3 and result["avg_at_k"] <= result["pass_at_k"]
    Path("p.jsonl").write_text(
        '{"problem": "7+8*3", "answer": "5"}\n{"problem": "1+1-1", "answer": "impossible"}\n'
    )
    result = evaluate(capsys, "relay", *PAIR, "--data", "p.jsonl", "--k", "40")
    assert result["problems"] == 2 and result["pass_at_k"] == 0.5 and 0 < result["avg_at_k"] < 0.5


def test_the_agents_that_are_evaluated_are_those_of_the_run(capsys):
    """A run whose last agent is deaf scores 0; and without --team the newest run is taken."""
    for name in ("older", "newer"):
        run(Path("runs", name), "--agents", "2", "--stages", "1", "--lr", "0")
    model = load_model("runs/newer/agents/1")
    model.model.norm.weight.data.zero_()  # every token equally likely
    save_model(model, "runs/newer/agents/1")
    write_sums(Path("runs/newer/agents"))
    os.utime("runs/older/summary.json", (0, 0))
    older, newer, newest = (
        evaluate(capsys, "--problems", "200", "--again", *team)
        for team in (["--team", "runs/older"], ["--team", "runs/newer"], [])
    )
    assert older["avg_at_k"] > 0.1 and newer["avg_at_k"] < 0.05
    assert newest["team"] == "runs/newer" and newest["avg_at_k"] == newer["avg_at_k"]
    Config(task="convention").save(Path("config.json"))
    for name, text in (("broken", "{"), ("other", Path("config.json").read_text())):  # newer, not of relay
        Path("runs", name, "agents").mkdir(parents=True)
        Path("runs", name, "summary.json").write_text("{}")
        Path("runs", name, "config.json").write_text(text)
    assert evaluate(capsys, "relay", "--problems", "8")["team"] == "runs/newer"


@pytest.mark.parametrize("flags", [["--task", "mine.py"], ["--task", "jsonl", "--data", "sums.jsonl"]])
def test_the_command_that_a_run_prints_last_works_for_every_task(capsys, monkeypatch, flags):
    """A run on a task of one's own, and on a JSONL file: evaluated on its own task and data, named or not."""
    sums = [json.dumps({"question": f"{i % 10}+{i // 10}", "answer": "?"}) for i in range(60)]
    Path("sums.jsonl").write_text("\n".join(sums))
    Path("mine.py").write_text("from teamtr_min.tasks import Relay as task")
    # The shipped model has no tokens for the English roles.
    monkeypatch.setattr(WordProblems, "roles", lambda self, n: Relay(Config()).roles(n))
    run(Path("runs/mine"), *flags, "--stages", "1")
    words = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python eval.py ").split()
    named, plain = (evaluate(capsys, *w, "--problems", "4", "--again") for w in (words, words[1:]))
    assert named["benchmark"] == plain["benchmark"] == flags[1] and named["avg_at_k"] == plain["avg_at_k"]


def test_another_model_is_evaluated_with_the_defaults_that_train_uses(monkeypatch):
    monkeypatch.setattr("teamtr_min.bench.accuracy.pinned", lambda config: config)
    assert find_subject(None, {"model": "x"}).config == Config(model="x") != Config(model="relay")


def test_word_problems_of_a_file_are_all_evaluated(capsys):
    lines = [json.dumps({"ask": f"{i} + {i}?", "gold": f"so #### {2 * i}"}) for i in range(5)]
    Path("p.jsonl").write_text("\n".join(lines))
    stories = str(shared("stories260K/hf_qwen2"))  # a model that reads English
    flags = ["jsonl", "--model", stories, *PAIR, "--data", "p.jsonl", "--max-new-tokens", "4"]
    result = evaluate(capsys, *flags, "--question-field", "ask", "--answer-field", "gold")
    assert result["benchmark"] == "jsonl" and result["problems"] == 5 and result["avg_at_k"] == 0
    sentence = refusal(capsys, evaluation.main, *flags)
    assert 'line 1: no text in the field "question" (it has: ask, gold)' in sentence


def test_the_table_shows_three_transcripts(capsys):
    assert evaluation.main(["--problems", "8", "--k", "4", "--device", "cpu"]) == 0  # the shipped team
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
    R = len(messages)
    return Rollouts(None, [Problem("", "", "1")] * R, messages, returns, len(answers[0]), [0] * R, 0.0)


def test_a_vote_takes_the_answer_of_most_and_the_first_of_equals():
    votes = [["1", "2", "2"], ["2", "1", "1"], ["1", "2", "3"], ["3", "2", "1"]]
    rollouts = fake_rollouts(votes, [[-1.0] * 3] * 4)
    assert pick(rollouts, "vote", Relay(Config(agents=1))).tolist() == [0, 1, 1, 0]


def test_best_of_takes_the_likeliest_per_token_whatever_its_length_and_return():
    rollouts = fake_rollouts([["1", "2", "2"], ["2", "2", "1"]], [[-0.5, -0.2, -0.9], [-3.0, -2.0, -1.0]])
    assert pick(rollouts, "best_of", None).tolist() == [0, 1]


def test_equal_answers_are_one_answer_to_a_vote():
    Path("p.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    task = WordProblems(Config(task="jsonl", data="p.jsonl"))
    said = ["#### 1,234.50", "the answer is $1234.5", r"\boxed{\frac{2469}{2}}"]
    said += ["#### $X + y$", r"\boxed{x+y.}", "no"]
    answers = [task.answer([Message(0, [], text, [], True)]) for text in said]
    assert answers[0] == answers[1] == answers[2] != answers[3] == answers[4] and answers[5] is None


def test_solo_takes_the_teams_turns_and_as_many_tokens(capsys):
    """A copy of the same model taking all turns spends what the team does."""
    result = evaluate(capsys, "relay", "--agents", "3", "--problems", "40", "--k", "2", "--mode", "solo")
    equal = result["equal_tokens"]
    assert equal["rollouts_per_problem"] == [2, 2] and equal["difference"] == equal["team"] - equal["solo"]
    assert equal["tokens_per_problem"][0] == pytest.approx(equal["tokens_per_problem"][1], rel=0.1)


def test_who_would_vote_needs_several_rollouts_and_a_task_with_answers(capsys):
    Path("mine.py").write_text("""
import teamtr_min.tasks as t

class Mine(t.Relay):
    answer = None

    def grade(self, problem, messages):
        return 0.0

task = Mine
""")  # fmt: skip
    flags = [*PAIR, "--problems", "8"]
    assert "--k of at least 2" in refusal(capsys, evaluation.main, "relay", *flags, "--mode", "vote")
    for mode in ("vote", "solo"):
        sentence = refusal(capsys, evaluation.main, "mine.py", *flags, "--mode", mode, "--k", "2")
        assert "a method answer" in sentence
    assert evaluate(capsys, "mine.py", *flags, "--mode", "solo")["avg_at_k"] == 0


def test_results_are_kept_with_what_they_were_read_from():
    """Each measurement appends a line; its hash is of the weights: one changed number, another hash."""
    model = load_model("relay")
    save_model(model, "a")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        Path("a", file).write_text((RELAY / file).read_text())
    flags = ["relay", "--model", "a", *PAIR, "--problems", "8", "--show", "0"]
    for seed in ("3", "3", "4"):
        assert evaluation.main([*flags, "--seed", seed, "--again"]) == 0
    model.model.norm.weight.data[0] += 1e-3
    save_model(model, "a")
    assert evaluation.main(flags) == 0
    lines = [json.loads(line) for line in Path("runs/eval.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [3, 3, 4, 0]
    assert lines[0]["avg_at_k"] == lines[1]["avg_at_k"]
    hashes = [line["model_hash"] for line in lines]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


SMALL = "--problems", "12", "--k", "2"


def toy_teams(*names: str) -> str:
    """Directories of runs that differ by their seed; as `--team` takes them."""
    for seed, name in enumerate(names):
        config = Config(agents=2, seed=seed, device="cpu")
        Path("runs", name).mkdir(parents=True)
        config.save(Path("runs", name, "config.json"))
        load_team(config, Relay(config).roles(2)).save(Path("runs", name, "agents"))
    return ",".join(f"runs/{name}" for name in names)


def lines_of(capsys, *flags: str, code: int = 0) -> list[str]:
    capsys.readouterr()
    assert evaluation.main([*flags]) == code
    return capsys.readouterr().out.splitlines()


def results(capsys, *flags: str) -> list[dict]:
    return [json.loads(line) for line in lines_of(capsys, *flags, "--json")]


def test_several_benchmarks_and_teams_are_one_table_and_each_team_is_loaded_once(capsys, monkeypatch):
    teams, loaded = toy_teams("a", "b"), []
    Path("mine.py").write_text("from teamtr_min.tasks import Relay as task")
    monkeypatch.setattr(
        accuracy, "load_team", lambda *given: loaded.append(given[2][0].parts[1]) or load_team(*given)
    )
    heading, *rows = lines_of(capsys, "relay", "mine.py", "--team", teams, *SMALL)
    assert heading.split() == "benchmark team mode avg@2 pass@2 problems tokens seconds grader".split()
    where = [("relay", "runs/a"), ("mine.py", "runs/a"), ("relay", "runs/b"), ("mine.py", "runs/b")]
    assert [tuple(row.split()[:2]) for row in rows] == where and loaded == ["a", "b"]
    assert len({row.index("[") for row in rows}) == 1
    alone = results(capsys, "mine.py", "--team", "runs/b", *SMALL, "--again")[0]
    assert f"{alone['avg_at_k']:.3f} [{alone['avg_at_k_ci'][0]:.3f}" in rows[3]
    assert results(capsys, "relay", "--team", "runs/a", *SMALL, "--mode", "solo")[0]["rounds"] == 2
    assert loaded == ["a", "b", "b", "a"], "the soloist is the team's first agent, already there"


def test_what_is_kept_is_not_measured_again(capsys, monkeypatch):
    """Unless --again says so, or anything that the result hangs on has changed."""
    toy_teams("a")
    Path("mine.py").write_text("from teamtr_min.tasks import Relay as task")
    Path("p.jsonl").write_text('{"problem": "7+8*3", "answer": "5"}\n')
    flags = ["relay", "--team", "runs/a", *SMALL]
    (first,) = results(capsys, *flags)
    assert results(capsys, *flags) == [first | {"kept": True}]
    text = "\n".join(lines_of(capsys, *flags))
    assert f"already measured on {first['time'][:10]}" in text and "pass@2" in text and "appended" not in text
    rows = lines_of(capsys, "relay", "mine.py", *flags[1:])[1:]
    assert ["already measured on" in row for row in rows] == [True, False]
    file = Path("runs/a/eval.jsonl")
    with file.open("a") as out:
        out.write('[]\n{"benchmark": "relay", "mo')  # cut short

    def is_measured(*flags: str) -> bool:
        before = file.read_bytes()
        (result,) = results(capsys, *flags)
        assert "kept" in result or file.read_bytes().startswith(before)
        return "kept" not in result

    assert is_measured(*flags, "--again") and not is_measured(*flags)
    data = [*flags, "--data", "p.jsonl"]
    mine = ["mine.py", *flags[1:]]
    assert is_measured(*data) and not is_measured(*data) and not is_measured(*mine)
    for change in ("--k 3", "--seed 5", "--mode vote", "--mode solo", "--max-new-tokens 8", "--rounds 2",
                   "--temperature 0.5", "--problems 11", "--router random"):  # fmt: skip
        assert is_measured(*flags, *change.split()), change
        assert not is_measured(*flags, *change.split()), change
    Path("p.jsonl").write_text('{"problem": "7+8*4", "answer": "0"}\n')
    Path("q.jsonl").write_text('{"problem": "7+8*3", "answer": "5"}\n')
    assert is_measured(*data) and not is_measured(*flags, "--data", "q.jsonl")  # its content counts
    Path("mine.py").write_text("from teamtr_min.tasks import Relay as task  # changed")
    assert is_measured(*mine)
    model = load_model("runs/a/agents/1")
    model.model.norm.weight.data[0] += 1e-3
    save_model(model, "runs/a/agents/1")
    write_sums(Path("runs/a/agents"))
    assert is_measured(*flags)


def test_what_fails_loses_nothing_of_the_rest(capsys):
    toy_teams("a", "b")
    Path("runs/a/agents/1/model.safetensors").write_bytes(b"no weights")
    flags = ["relay", "--team", "runs/a,runs/none,runs/b", *SMALL]
    capsys.readouterr()
    assert evaluation.main([*flags, "--json"]) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["team"] for line in out.splitlines()] == ["runs/b"]
    broken, missing = (line for line in err.splitlines() if line.startswith("error: "))
    assert broken.startswith("error: relay, runs/a: ") and "model.safetensors" in broken
    assert missing.startswith("error: relay, runs/none: ") and "No such file" in missing
    assert len(Path("runs/b/eval.jsonl").read_text().splitlines()) == 1


def test_an_interrupted_table_keeps_its_rows(capsys, monkeypatch):
    teams = toy_teams("a", "b")
    interrupt_at(2, monkeypatch, accuracy, "sample")
    rows = lines_of(capsys, "relay", "--team", teams, *SMALL, code=130)[1:]
    assert len(rows) == 1 and Path("runs/a/eval.jsonl").exists() and not Path("runs/b/eval.jsonl").exists()
    rows = lines_of(capsys, "relay", "--team", teams, *SMALL)[1:]
    assert ["already measured" in row for row in rows] == [True, False]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("chess", "no benchmark chess"),
        ("--k 0", "must be at least 1"),
        ("--team nowhere", "nowhere/config.json: No such file"),
        ("--team x --agents 2", "leave out --agents"),
        ("--agents 2 --data nowhere.jsonl", "cannot read nowhere.jsonl"),
        ("jsonl --agents 2", "--task jsonl needs --data"),
    ],
)
def test_bad_input_is_a_sentence(capsys, flags, message):
    assert message in refusal(capsys, evaluation.main, *flags.split())
