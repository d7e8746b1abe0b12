"""eval.py: whom it evaluates and on what, avg@k, pass@k, votes, partial credit, several results, ask."""

import io
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import random_model, shared, write_checkpoint, write_tokenizer
from toy_runs import evaluate, interrupt_at, printed, refused

import eval as evaluation
from teamtr_min import load_model, load_team, save_model
from teamtr_min.bench import accuracy
from teamtr_min.bench.accuracy import best_of, pick
from teamtr_min.config import Config
from teamtr_min.files import sha256
from teamtr_min.rollout import Rollouts
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Problem, Relay
from teamtr_min.tasks.task import Message

PAIR = "--agents", "2", "--device", "cpu"
GRADED = """
from teamtr_min.tasks import Relay
class task(Relay):
    grader = "length"
    def grade(self, problem, messages):
        return sum(messages[-1].tokens) % 10 / 10
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def toy_teams(*names: str) -> str:
    for seed, name in enumerate(names):
        config = Config(agents=2, seed=seed, device="cpu")
        Path("runs", name).mkdir(parents=True)
        config.save(Path("runs", name, "config.json"))
        build_team(config, Relay(config)).save(Path("runs", name, "agents"))
    return ",".join(f"runs/{name}" for name in names)


@pytest.mark.parametrize("values", [[0, 0, 1, 0, 1, 1], [1, 1, 1, 1], [0.2, 0.9, 0.0, 0.2, 1.0, 0.5]])
def test_the_best_of_j_is_the_mean_over_all_choices_of_j(values):
    for j in range(1, len(values) + 1):
        expected = [max(chosen) for chosen in itertools.combinations(values, j)]
        found = best_of(torch.tensor([values, [0.0] * len(values)]), j)
        assert found.tolist() == pytest.approx([sum(expected) / len(expected), 0.0])


def test_a_vote_takes_the_answer_of_most_and_best_of_the_likeliest_per_token():
    """Of equals the first; rollouts without an answer do not vote; no length and no return counts."""
    votes = [["1", "2", "2"], ["2", "1", "1"], ["1", "2", "3"], ["3", "2", "1"], ["", "", "1"], ["", "", ""]]
    sure = [[-0.5, -0.2, -0.9], [-3.0, -2.0, -1.0], *[[-1.0, -1.5, -1.5]] * 4]  # mean log-prob per token
    messages = [
        [Message(0, [1] * n, text, [value] * n, True)]
        for texts, values in zip(votes, sure)
        for n, (text, value) in enumerate(zip(texts, values), start=1)
    ]
    returns = torch.tensor([float(text == "1") for texts in votes for text in texts])
    rollouts = Rollouts([Problem("", "", "1")] * 18, messages, returns, 3)
    task = SimpleNamespace(answer=lambda messages: messages[-1].text or None)
    assert pick(rollouts, "vote", task).flatten().tolist() == [0, 1, 1, 0, 1, 0]
    assert pick(rollouts, "best_of", None).flatten().tolist() == [0, 1, 1, 0, 0, 0]


def test_one_object_has_the_promised_fields_and_reads_the_problems_of_a_file(capsys):
    result = evaluate(capsys, "relay", *PAIR, "--problems", "20", "--k", "3")
    assert {"benchmark", "mode", "avg_at_k_ci", "pass_at_k_ci"} <= result.keys()
    assert result["problems"] == 20 and result["k"] == 3
    assert result["avg_at_k"] == result["return_at_k"] <= result["pass_at_k"] and not result["partial"]
    lines = ({"problem": "7+8*3", "answer": "5"}, {"problem": "1+1-1", "answer": "impossible"})
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = evaluate(capsys, "relay", *PAIR, "--data", "p.jsonl", "--k", "40")
    assert result["problems"] == 2 and result["pass_at_k"] == 0.5 and 0 < result["avg_at_k"] < 0.5


def test_the_agents_that_are_evaluated_are_those_of_the_run(capsys):
    toy_teams("older", "newer")
    model = load_model("runs/newer/agents/1")
    model.model.norm.weight.data.zero_()  # every token equally likely
    save_model(model, "runs/newer/agents/1")
    for age, name in enumerate(("newer", "older")):
        os.utime(f"runs/{name}/agents", (1000 - age, 1000 - age))
    Path("runs/other/agents").mkdir(parents=True)
    Path("runs/other/config.json").write_text('{"task": "convention"}')  # newer, and not of relay
    flags = "relay", "--problems", "200"
    old, new = evaluate(capsys, *flags, "--team", "runs/older"), evaluate(capsys, *flags)
    assert old["avg_at_k"] > 0.1 and new["avg_at_k"] < 0.05 and new["team"] == "runs/newer"
    solo = evaluate(capsys, *flags, "--mode", "solo", "--samples", "s.jsonl")
    said = [json.loads(line)["messages"] for line in open("s.jsonl")]
    assert solo["avg_at_k"] > 0.1 and all([m["agent"] for m in messages] == [0, 0] for messages in said)


def test_word_problems_of_a_file_are_all_evaluated_or_those_that_fit(capsys):
    long = {7: "word " * 900}  # the model has 512 positions
    lines = [{"ask": long.get(i, f"{i} + {i}?"), "gold": f"so #### {2 * i}"} for i in range(30)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stories = str(shared("stories260K/hf_qwen2"))  # a model that reads English
    flags = ["jsonl", "--model", stories, *PAIR]
    flags += "--data p.jsonl --max-new-tokens 4 --fields ask,gold".split()
    assert "p.jsonl, line 8 makes a prompt of" in refused(capsys, evaluation.main, *flags)
    result = evaluate(capsys, *flags, "--drop-long", "--mode", "solo")
    assert result["benchmark"] == "jsonl" and result["problems"] == 29 and result["avg_at_k"] == 0
    assert 0.1 < result["avg_at_k_ci"][1] < 0.2, "0 of 29 is not 0 of all"
    file = Path("p.jsonl").absolute()
    exam = accuracy.Exam("a run", Config(task="jsonl", model="relay", data=str(file), fields="ask,gold"))
    own, held_out = (accuracy.prepare(exam, "jsonl", None, data).problems for data in ("p.jsonl", None))
    assert own == held_out and len(own) < 10, "not those that the run was trained on"


def test_shots_are_training_problems_in_front_of_what_an_agent_sees(capsys):
    Path("words").mkdir()
    for side in ("train", "test"):
        lines = (json.dumps({"question": f"{side} {i}?", "answer": f"word{i}"}) for i in range(9))
        Path("words", f"{side}.jsonl").write_text("\n".join(lines))
    write_tokenizer(write_checkpoint(Path("tiny"), random_model("qwen2", vocab_size=262)))
    flags = ["jsonl", "--model", "tiny", *PAIR, "--max-new-tokens", "2", "--shots", "3", "--data"]
    result = evaluate(capsys, *flags, "words", "--limit", "4", "--show-prompts")
    shown = result["prompts_in_use"].split("agent 1, ")[1]
    examples = re.findall(r"train (\d)\?\n *Answer: word\1\n", shown)
    assert result["shots"] == [f"train.jsonl, line {int(i) + 1}" for i in examples] and len(examples) == 3
    assert result["problems"] == 4 and shown.count("test") == 1 and "word" not in shown.split("test 0?")[1]
    assert "--shots are training" in refused(capsys, evaluation.main, *flags, "words/train.jsonl")


def test_the_heading_names_all_that_a_result_rests_on(capsys):
    Path("roles.json").write_text(json.dumps([{"name": name, "system": ""} for name in "XYZ"]))
    text = printed(capsys, *"--problems 8 --k 4 --device cpu --roles roles.json".split())
    team = "untrained team", "model relay, agents 3, rounds 1, router round-robin", "prompts roles.json"
    how = "max_new_tokens 16", "temperature 1.0,", "grader exact", "problems 8, left_out 0, k 4", "pass@2"
    assert all(part in " ".join(text.split()) for part in (*team, *how, "avg@4")), text


def test_a_team_that_is_asked_with_other_files_than_it_was_trained_with_is_told(capsys):
    Path("roles.json").write_text(json.dumps([{"name": name, "system": ""} for name in "XY"]))
    toy_teams("a")
    config = Path("runs/a/config.json")
    about = {"roles": "roles.json", "fingerprint": {"roles file": sha256(Path("roles.json"))}}
    config.write_text(json.dumps(json.loads(config.read_text()) | about))
    flags = "relay", "--team", "runs/a", "--problems", "8", "--device", "cpu"
    assert evaluation.main(flags) == 0 and not capsys.readouterr().err
    Path("roles.json").write_text(json.dumps([{"name": name, "system": ""} for name in "YX"]))
    assert evaluation.main(flags) == 0 and "another roles file than roles.json" in capsys.readouterr().err


def test_partial_credit_is_what_is_shown_and_accuracy_beside_it(capsys):
    Path("mine.py").write_text(GRADED)
    flags = ["mine.py", *PAIR, "--problems", "30", "--k", "2"]
    result = evaluate(capsys, *flags, "--samples", "s.jsonl")
    lines = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    returns = [line["return"] for line in lines]
    assert len(lines) == 60 and [line["sample"] for line in lines[:4]] == [0, 1, 0, 1]
    assert {"text", "answer", "messages", "team", "benchmark"} <= lines[0].keys()
    assert result["partial"] and result["avg_at_k"] == 0 and result["avg_at_k_ci"][1] > 0
    low, high = result["return_at_k_ci"]
    assert low < result["return_at_k"] < high and abs(result["return_at_k"] - sum(returns) / 60) < 1e-6
    best = sum(max(pair) for pair in zip(returns[::2], returns[1::2])) / 30
    assert result["best_at_k"] == pytest.approx(best, abs=1e-6)
    assert f"return@2      {result['return_at_k']:.3f} [" in printed(capsys, *flags)


def test_samples_hold_what_each_agent_was_given_and_several_seeds_their_standard_error(capsys):
    flags = ["relay", *PAIR, "--problems", "30", "--k", "2"]
    alone = [evaluate(capsys, *flags, "--seed", str(seed))["avg_at_k"] for seed in (4, 5, 6)]
    result = evaluate(capsys, *flags, "--seed", "4", "--seeds", "3", "--samples", "s.jsonl")
    values = torch.tensor(alone, dtype=torch.float64)
    assert result["avg_at_k"] == pytest.approx(values.mean()) and values.std() > 0
    assert result["avg_at_k_se"] == pytest.approx(values.std() / 3**0.5)
    assert f"±{result['avg_at_k_se']:.3f}" in printed(capsys, *flags, "--seed", "4", "--seeds", "3")
    lines = [json.loads(line) for line in open("s.jsonl")]
    assert [line["seed"] for line in lines] == [4] * 60 + [5] * 60 + [6] * 60
    assert sum(line["return"] for line in lines) / 180 == pytest.approx(result["avg_at_k"])
    team = load_team(["relay", "relay"], roles=Relay(Config(agents=2)).roles(2), device="cpu")
    for line in lines[:4]:
        said = [(m["agent"], m["text"]) for m in line["messages"]]
        ids = [team.prompt(j, line["text"], said[:j]) for j in range(2)]
        assert line["prompts"] == [team.agents[0].tokenizer.decode(i, skip_special_tokens=False) for i in ids]
        assert line["text"] in line["prompts"][0] and said[0][1] in line["prompts"][1]
        assert line["return"] == (line["team_answer"] == line["answer"])


def test_several_benchmarks_and_teams_are_one_table(capsys, monkeypatch):
    teams = toy_teams("a", "b")
    Path("mine.py").write_text("from teamtr_min.tasks import Relay as task")
    small = "--problems", "12", "--k", "2"
    lines = printed(capsys, "relay", "mine.py", "--team", teams, *small).splitlines()
    rows = [line.split() for line in lines if not line.startswith("  ")]
    wanted = [(task, f"runs/{team}") for team in "ab" for task in ("relay", "mine.py")]
    assert [(row[0], row[-1]) for row in rows] == wanted
    alone = evaluate(capsys, "mine.py", "--team", "runs/b", *small)
    low, high = alone["avg_at_k_ci"]
    assert f"{alone['avg_at_k']:.3f} [{low:.3f}, {high:.3f}] avg@2" in lines[-1]
    interrupt_at(2, monkeypatch, accuracy, "collect")
    assert evaluation.main(["relay", "--team", teams, "--problems", "8"]) == 130
    out, err = capsys.readouterr()
    assert "runs/a" in out and "runs/b" not in out and err == "interrupted\n"


def test_damaged_weights_are_a_sentence_after_the_results_before_them(capsys):
    toy_teams("a", "b")
    Path("runs/b/agents/1/model.safetensors").write_bytes(b"no weights")
    assert evaluation.main("relay --team runs/a,runs/b --problems 8 --json".split()) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["team"] == "runs/a" and "error: " in err and "model.safetensors" in err


def test_what_cannot_be_is_refused_before_any_model_is_loaded(capsys, monkeypatch):
    toy_teams("a")
    Path("mine.py").write_text(GRADED.replace("grader = ", "answer = None\n    grader = "))
    monkeypatch.setattr(accuracy, "build_team", lambda *given: pytest.fail("a model was loaded"))
    for flags, message in {
        "relay chess": "no benchmark chess",
        "--team runs/a,nowhere": "nowhere/config.json",
        "--team runs/a --agents 2": "leave out --agents",
        "--agents 2 --data nowhere.jsonl": "nowhere.jsonl",
        "jsonl --agents 2": "--task jsonl needs --data",
        "relay --agents 2 --data .": ". cannot be read: Is a directory",
        "relay --mode vote": "--k of at least 2",
        "mine.py --agents 2 --mode vote --k 2": "a method answer",
        "gsm8k --model nowhere": "no model 'nowhere'",
        "ask hi --mode solo": "--mode has no effect on ask",
        "ask hi --k 300": "takes up to 256",
        "ask hi --team runs/a,runs/a": "takes one run",
        "relay --web": "--web has no effect on relay",
        "report --k 2": "--k has no effect on report",
        "training --agents 5": "--agents has no effect on training",
    }.items():
        assert message in refused(capsys, evaluation.main, *flags.split())


def test_a_team_can_be_asked(capsys, monkeypatch):
    toy_teams("a")
    answers = load_team("runs/a", device="cpu").solve("7+8*3", samples=6)
    text = printed(capsys, "ask", "7+8*3", "--team", "runs/a", "--device", "cpu")
    said = [f"  {message.name}: {message.text}" for message in answers[0].messages]
    assert text.splitlines() == [*said, f"answer: {answers[0].answer}"]
    monkeypatch.setattr("sys.stdin", io.StringIO("7+8*3\n1+2-3\n"))
    lines = printed(capsys, "ask", "--team", "runs/a", "--device", "cpu", "--k", "6", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["question"] for line in found] == ["7+8*3"] * 6 + ["1+2-3"] * 6
    for line, answer in zip(found, answers):
        assert [m["text"] for m in line["messages"]] == [m.text for m in answer.messages]
        assert line["answer"] == answer.answer
