"""A run at toy size: what it writes, that it repeats, what flags do, what ends it; the README's commands."""

import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from tiny import real_model
from toy_runs import TOY, bits, evaluate, lines, refused, results, run, weights

import train
from teamtr_min import occupancy
from teamtr_min.config import Config
from teamtr_min.tasks import Relay, WordProblems

ROOT = Path(__file__).parent.parent
DOCS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


def test_a_run_writes_what_it_promises(finished):
    out, (summary, updates, stages) = finished, results(finished)
    wanted = {"config.json", "metrics.jsonl", "transcripts.jsonl", "summary.json", "agents", "checkpoints"}
    assert {p.name for p in out.iterdir()} - {"summary.png"} == wanted  # which needs matplotlib
    kinds = [json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["evaluation", *["update", "update", "update", "stage"] * 3, "evaluation"]
    assert [(u["stage"], u["agent"]) for u in updates] == [(s, j) for s in range(3) for j in range(3)]
    assert ["accuracy_held_out" in stage for stage in stages] == [True, True, False]
    assert summary["stages"] == 3 and summary["rollouts"] == sum(u["rollouts"] for u in updates) >= 3 * 12
    assert summary["reason"] is summary["stopped"] is None and "accuracy_untrained" not in summary
    assert summary["tokens_trained"] == sum(u["tokens_trained"] for u in updates) > 0
    assert summary["violation_rate_after"] == 0
    for name in ("start", "final"):
        low, high = summary[f"accuracy_{name}_ci"]
        assert 0 < low < summary[f"accuracy_{name}"] == summary[f"return_{name}"] < high < 1
    for u in updates:
        assert u["kl_after"] <= u["delta"] and u["messages"] == 12
        assert u["sampler_mismatch_max"] < 1e-3 and u["entropy"] > 0 and u["grad_norm"] > 0
    rates = [1.5e-3 * (1 + math.cos(math.pi * u / 9)) for u in range(9)]
    assert [u["lr"] for u in updates] == pytest.approx(rates)
    for line in (out / "transcripts.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"id", "text", "answer", "messages", "return", "stage", "split"} == set(record)
        assert [m["agent"] for m in record["messages"]] == [0, 1, 2]
        assert Relay(Config()).is_held_out(record["text"]) == (record["split"] == "held-out")
        assert record["return"] == float(record["messages"][-1]["text"] == record["answer"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(finished, tmp_path):
    for seed in ("0", "1"):
        run(tmp_path / seed, "--seed", seed, *SHARED)
        alike = [a == b for a, b in zip(bits(finished), bits(tmp_path / seed))]
        assert alike == [seed == "0"] * 3


@pytest.mark.parametrize("flags", [
    "--order reversed --ratio token --max-new-tokens 5", "--model relay,relay,relay --temperature 0.8",
    "--order random --ratio mean --kl-estimator k1 --kl-unit token", "--router without_b.py --diagnostics",
    "--router random --rounds 2 --beta 0 --occupancy corrected --min-ess 0.9", "--agents 1 --delta inf",
    "--occupancy joint --advantage-clip 0.7 --no-group-norm --dtype bf16",
])  # fmt: skip
def test_every_choice_runs_and_no_metrics_line_holds_a_null(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    Path("without_b.py").write_text("def router(turn, *others):\n    return turn % 2 * 2\n")
    seen, compute = [], train.group_advantages
    monkeypatch.setattr(train, "group_advantages", lambda *a, **k: seen.append((a[1], k)) or compute(*a, **k))
    _, updates, _ = run(Path("run"), *flags.split())
    if "norm" in flags:
        assert seen == [(0.7, {"normalise": False, "weight": None})] * 2
    for file in Path("run").glob("*.json*"):
        assert not {"Infinity", "NaN"} & set(re.findall(r"\w+", file.read_text())), file
    assert "null" not in Path("run/metrics.jsonl").read_text()
    if "reversed" in flags:
        assert [u["agent"] for u in updates] == [2, 1, 0] * 2
        second, first = (updates[i]["truncated"] for i in (1, 2))
        assert first > 0.5 > second and updates[2]["message_tokens"] == 5
    if "without_b" in flags:
        assert ["kl_after" in u for u in updates] == [True, False, True] * 2


SAMPLED = {  # rollouts that each update of a stage samples anew
    "--occupancy fresh": [12, 12, 12], "--min-ess 0": [12, 0, 0], "--min-ess 0.99": [12, 12, 12],
    "--occupancy stale": [12, 0, 0], "--occupancy joint": [12],
}  # fmt: skip


@pytest.mark.parametrize("flags", SAMPLED)
def test_rollouts_are_sampled_and_counted_when_the_flag_says(half_right, tmp_path, monkeypatch, flags):
    collected, collect = [], occupancy.collect
    monkeypatch.setattr(occupancy, "collect", lambda *a: collected.append(a[-1].words) or collect(*a))
    summary, updates, _ = run(tmp_path / "run", *flags.split())
    new = SAMPLED[flags]
    assert [u["rollouts"] for u in updates] == new * 2
    assert collected == [("train", stage, i) for stage in range(2) for i, count in enumerate(new) if count]
    for u in updates:
        assert (u["tokens_sampled"] > 0) == (u["seconds_sampling"] > 0) == (u["rollouts"] > 0)
    assert summary["rollouts"] == 2 * sum(new) and summary["rollouts_evaluation"] == 2 * 8
    assert summary["tokens_sampled"] == sum(u["tokens_sampled"] for u in updates)


@pytest.mark.parametrize("kl", ["hard", "adaptive", "fixed", "none"])
def test_the_kl_flag_says_what_holds_an_update_back(half_right, tmp_path, kl):
    summary, updates, _ = run(tmp_path / "run", "--kl", kl, "--delta", "0.002", "--beta", "0.1")
    assert all(u["delta"] == 0.002 and u["steps"] for u in updates) and summary["violation_rate_before"] > 0.5
    assert (max(u["kl_after"] for u in updates) <= 0.002) == (kl == "hard")
    assert any(u["halvings"] for u in updates) == (kl == "hard")
    assert (summary["violation_rate_after"] == 0) == (kl == "hard")
    betas = {u["beta"] for u in updates if u["stage"] == 1}
    assert (betas != {0.0 if kl == "none" else 0.1}) == (kl in ("hard", "adaptive"))


def test_every_metrics_key_is_explained(tmp_path):
    flags = "--task convention --diagnostics --eval-every 1 --stages 2".split()
    summary, updates, stages = run(tmp_path / "run", *flags)
    assert {"habits", "ess", "accuracy_held_out"} <= updates[0].keys() | stages[0].keys()
    keys = set().union(summary, *updates, *stages)
    assert not [key for key in sorted(keys) if f"`{key}`" not in DOCS]


def test_a_team_learns(tmp_path):
    flags = "--agents 2 --stages 12 --problems 24 --group 8 --inner-steps 6 --lr 5e-4 --delta 0.02"
    summary, *_ = run(tmp_path / "run", *flags.split(), "--eval-problems", "512")
    assert summary["accuracy_final"] > summary["accuracy_start"] + 0.25


REAL = "--agents 2 --task sums --device cpu --warm-start 4 --problems 2 --stages 1 --group 4 --inner-steps 1"


def test_a_real_team_starts_warm_trains_inside_its_radius_and_is_evaluated(tmp_path, capsys):
    """Of 135 million parameters."""
    flags = ["--model", str(real_model()), *REAL.split(), "--eval-problems", "2", "--max-new-tokens", "12"]
    all_threads = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    words = [sys.executable, train.__file__, *flags, "--out", "run"]
    subprocess.run(words, check=True, cwd=tmp_path, env=all_threads)
    out = tmp_path / "run"
    (summary, updates, _), warm = results(out), lines(out, "warm_start")
    assert len(warm) == 8 and warm[-1]["loss"] < 0.5 * warm[0]["loss"]
    assert len(updates) == 2 and summary["accuracy_final"] is not None
    assert all(u["kl_after"] <= u["delta"] and u["sampler_mismatch_max"] < 1e-2 for u in updates)
    assert 0.7 < summary["memory_planned"] / summary["memory_peak"] < 1.3
    found = evaluate(capsys, "sums", "--team", str(out), "--problems", "2")
    assert found["problems"] == 2 and found["benchmark"] == "sums"


OWN = "from teamtr_min.tasks import Relay\nclass task(Relay):\n    def "


def test_partial_credit_is_seen_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grade = "grade(self, problem, messages): return 0.2 + 0.7 * super().grade(problem, messages)"
    Path("mine.py").write_text(OWN + grade)
    summary, _, stages = run(Path("run"), *"--task mine.py --eval-every 1 --eval-problems 32".split())
    start, final = summary["return_start"], summary["return_final"]
    assert summary["accuracy_start"] == summary["accuracy_final"] == 0 and 0.2 < min(start, final)
    said, stage = capsys.readouterr().out, f"return {stages[0]['return_mean']:.3f} (accuracy 0.000)"
    assert stage in said and f"held-out return {start:.3f} -> {final:.3f} [" in said


ROUTER = "calls = []\ndef router(turn, *others):\n    calls.append(turn)\n    "


@pytest.mark.parametrize("fault, words", [
    ("if len(calls) > 0: return 7", "line 2: `router` returned 7"),
    ("if len(calls) > 150: 1 / 0", "line 4: `router` failed: ZeroDivision"),
])  # fmt: skip
def test_a_run_that_fails_names_the_line_and_keeps_its_team(tmp_path, capsys, monkeypatch, fault, words):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"{ROUTER}{fault}\n    return turn % 3\n")
    assert train.main([*TOY, "--out", "run", "--router", "mine.py"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"error: mine.py, {words}")
    assert ("Traceback" in said) == ("failed" in words)
    assert Path("run").exists() == ("150" in fault)
    if "150" in fault:
        summary = json.loads(Path("run/summary.json").read_text())
        assert summary["reason"] == "error" and f"mine.py, {words}" in summary["stopped"]
        assert Path("run/agents/2/model.safetensors").is_file()


def test_not_a_number_stops_the_run_and_keeps_the_last_good_team(tmp_path, capsys, monkeypatch):
    out, compute, calls = tmp_path / "run", train.group_advantages, itertools.count(1)

    def spoil(*given, **named):
        return compute(*given, **named) * (math.nan if next(calls) == 5 else 1)

    monkeypatch.setattr(train, "group_advantages", spoil)
    assert train.main([*TOY, "--out", str(out)]) == 1
    summary, updates, stages = results(out)
    assert capsys.readouterr().err == f"stopped: {summary['stopped']}\n"
    assert summary["reason"] == "diverged" and "loss is nan" in summary["stopped"]
    assert summary["accuracy_final"] is None and (len(updates), len(stages)) == (4, 1)
    assert all(torch.isfinite(p).all() for agent in weights(out) for p in agent.values())


def test_what_a_tasks_measure_returns_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TOY, "--task", "mine.py", "--model", "relay", "--out"]
    faults = {'{"x": [1.0, float("nan")]}': "JSON cannot hold", '{"lr": 1}': "lr, which are logged"}
    for out, (returned, words) in zip(("run", "other"), faults.items()):
        Path("mine.py").write_text(f"{OWN}measure(self, problems, messages): return {returned}")
        assert words in refused(capsys, train.main, *flags, out)


def test_an_existing_output_directory_is_refused_first_and_never_written_into(tmp_path, capsys):
    thesis, used = tmp_path / "thesis.tex", f"--out {tmp_path} exists and is not empty; give another"
    for text in ("years of work", ""):
        thesis.write_text(text)
        for out, sentence in ((tmp_path, used), (thesis, "Not a directory")):
            assert sentence in refused(capsys, train.main, *TOY, "--out", str(out), "--model", "nonesuch")
        assert [*tmp_path.iterdir()] == [thesis] and thesis.read_text() == text


def blocks(language: str) -> list[str]:
    """Code blocks of the README and of docs/, lines that end in a backslash joined to the next."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS.replace("\\\n", " "), flags=re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Program and flags of every `python ...` in a bash block; lines of a shell loop, or with a file for
    the standard input, are left out."""
    for line in "".join(blocks("bash")).splitlines():
        found = re.search(r"\bpython (?:-m )?(\S+)(.*)", line.split("#")[0])
        if found and not {"$", "<"} & set(line):
            yield found[1], shlex.split(found[2])


SMALL = {  # program -> flags before and after those printed that keep it small
    "train.py": (TOY, "--stages 1 --problems 3 --inner-steps 2 --eval-problems 4"),
    "eval.py": ([], "--problems 16 --device cpu"),
    "teamtr_min.extras.replace": ([], "--align 2 --stages 2"),
}
TAKE_MINUTES = {"kernels", "occupancy", "sampling", "training", "gpu"}
ELSEWHERE = {  # in commands that other tests run, as they need a page, a hub, or a model that can read them
    "--web", "openai/gsm8k:main", "zebra-2x2", "zebra", "sums-99", "docs/desks", "runs/desks",
}  # fmt: skip


def test_the_commands_of_the_readme_and_the_docs_run(tmp_path, monkeypatch, capsys):
    """As printed, at toy size, in a directory that holds what they name; relay stands for other models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("7+8*3-4\n"))  # of `eval.py ask` without a question
    published = {True: tmp_path / "FILE", False: tmp_path / "HELD_OUT"}
    monkeypatch.setattr("teamtr_min.tasks.word_problems.local_copy", lambda name: published["train" in name])
    monkeypatch.setattr(WordProblems, "roles", lambda self, n: Relay(Config()).roles(n))  # in relay's words
    sums = [f"{i % 10}+{i // 10}" for i in range(60)]
    lines = [json.dumps({"question": text, "problem": text, "answer": "?"}) for text in sums]
    Path("DIR").mkdir()
    for file in ("DIR/train.jsonl", "DIR/test.jsonl", "FILE"):
        Path(file).write_text("\n".join(lines))
    Path("HELD_OUT").write_text("\n".join(lines[:20]))
    *_, own_task = (block for block in blocks("python") if "def task(" in block)
    Path("my_task.py").write_text(own_task)
    Path("roles.json").write_text(json.dumps([{"name": name, "system": ""} for name in "AB"]))
    run(Path("runs/NAME"), "--stages", "1")
    for name in "AB":
        shutil.copytree("runs/NAME", Path("runs", name))
    drawn, ran = {"report"} if importlib.util.find_spec("matplotlib") is None else set(), []
    for program, flags in commands():
        if program not in SMALL:
            assert importlib.util.find_spec(program), program
        elif not ({"--help"} | TAKE_MINUTES | ELSEWHERE | drawn) & set(flags):
            if "--model" in flags:
                flags[flags.index("--model") + 1] = "relay"
                flags = ["relay" if flag == "sums" else flag for flag in flags]  # which it cannot write
            before, after = SMALL[program]
            if "--resume" in flags and program == "train.py":  # small as it was begun
                before, after = [], ""
            after = "" if "report" in flags else "--device cpu" if "ask" in flags else after
            main = importlib.import_module(program.removesuffix(".py")).main
            assert not main([*before, *flags, *after.split()]), (program, flags, capsys.readouterr().err)
            ran.append(program)
    assert ran.count("train.py") > 4 and ran.count("eval.py") > 3
    (own,) = Path("runs").glob("my_task-3x-*")
    texts = [json.loads(line)["text"] for line in (own / "transcripts.jsonl").read_text().splitlines()]
    assert texts and all(re.fullmatch(r"\d\+\d", text) for text in texts)
