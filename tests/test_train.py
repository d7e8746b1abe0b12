"""A run at toy size: what it writes, that it repeats, what ends it; and the README's commands."""

import importlib.util
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import refusal
from teamtr_min.run.console import plot, size
from teamtr_min.run.metrics import violation_rate
from toy_runs import TOY, results, run, same, timeless, weights

import eval as evaluation
import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.occupancy import update_order
from teamtr_min.rollout import collect
from teamtr_min.studies import pretrain
from teamtr_min.tasks import Relay, WordProblems
from teamtr_min.team import load_team

ROOT = Path(__file__).parent.parent
DOCS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
MORE_EVALUATED = "--eval-problems", "64"  # so that accuracies are not all 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run's directory, summary, updates and stages."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    return out, *run(out, *MORE_EVALUATED)


def test_a_run_writes_what_it_promises(toy):
    out, summary, updates, _ = toy
    wanted = {"config.json", "metrics.jsonl", "transcripts.jsonl", "summary.json", "agents", "checkpoints"}
    assert {p.name for p in out.iterdir()} == wanted
    kinds = [json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["update", "update", "update", "stage"] * 2
    assert [(u["stage"], u["agent"]) for u in updates] == [(s, j) for s in range(2) for j in range(3)]
    assert summary["stages"] == 2 and summary["rollouts"] == 2 * 3 * 12 and summary["stopped"] is None
    for tokens in ("tokens_sampled", "tokens_trained"):
        assert summary[tokens] == sum(u[tokens] for u in updates) > 0
    assert summary["violation_rate_after"] == 0
    for u in updates:
        assert u["kl_after"] <= u["delta"] and u["messages"] == 12
        assert u["sampler_mismatch_max"] < 1e-3 and u["entropy"] > 0 and u["grad_norm"] > 0
    for line in (out / "transcripts.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"id", "text", "answer", "messages", "return", "stage", "split"} == set(record)
        assert [m["agent"] for m in record["messages"]] == [0, 1, 2]
        assert Relay.is_held_out(record["text"]) == (record["split"] == "held-out")
        assert record["return"] == float(record["messages"][-1]["text"] == record["answer"])


def test_the_learning_rate_decays_over_all_updates_and_a_random_order_changes(toy):
    wanted = [1.5e-3 * (1 + math.cos(math.pi * u / 6)) for u in range(6)]
    assert [u["lr"] for u in toy[2]] == pytest.approx(wanted)
    orders = [update_order(Config(agents=5, order="random"), stage) for stage in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(map(tuple, orders))) > 10


def test_every_update_draws_for_itself(tmp_path):
    """The same team before both updates: what differs is the draws."""
    _, updates, _ = run(tmp_path / "run", "--lr", "0", "--stages", "1", "--problems", "32")
    returns = [u["return_mean"] for u in updates]
    assert len(set(returns)) == 3 and max(returns) - min(returns) < 0.2


def test_the_knobs_of_the_advantage_reach_it(tmp_path, monkeypatch):
    seen, original = [], train.group_advantages
    monkeypatch.setattr(train, "group_advantages", lambda *a: seen.append(a[1:]) or original(*a))
    run(tmp_path / "run", "--advantage-clip", "0.7", "--eps-norm", "0.01", "--no-group-norm", "--stages", "1")
    assert seen == [(0.7, 0.01, False)] * 3


def test_violation_rates_count_what_exceeded_its_radius():
    updates = [{"delta": 0.02, "kl": kl} for kl in (0.01, 0.03, 0.02, 0.5)]
    assert violation_rate([*updates, {"kl": 9.0}, {"delta": 0.02}], "kl") == 0.5
    assert violation_rate([{"kl": 9.0}], "kl") is None  # no radius to exceed


def test_what_was_cut_off_is_counted(tmp_path):
    _, (first, second, *_), _ = run(tmp_path / "run", "--max-new-tokens", "5", "--stages", "1")
    assert first["truncated"] > 0.5 and first["message_tokens"] == 5 and second["truncated"] < 0.5


def test_the_saved_agents_are_those_that_accuracy_final_was_read_from(toy):
    out, summary, *_ = toy
    config = Config.load(out / "config.json")
    task = Relay(config)
    team = load_team(config, task.roles(3), [out / "agents" / str(j) for j in range(3)])
    problems = task.sample_problems(config.eval_problems, rng.generator(0, "held-out"), held_out=True)
    again = collect(team, task, problems, 1, rng.RngPath(config.seed, "held-out", config.stages))
    assert again.accuracy == summary["accuracy_final"] > 0


def test_the_same_seed_gives_the_same_bits_and_another_does_not(toy, tmp_path):
    out, *lines = toy
    for seed in ("0", "1"):
        again = run(tmp_path / seed, "--seed", seed, *MORE_EVALUATED)
        alike = [timeless(a) == timeless(b) for a, b in zip(lines[1:], again[1:])]
        alike += [timeless(lines[:1]) == timeless(again[:1]), same(weights(out), weights(tmp_path / seed))]
        assert alike == [seed == "0"] * 4


def test_sampling_fewer_rows_at_once_trains_the_same_team(toy, tmp_path):
    run(tmp_path / "run", "--batch-rows", "5")
    assert same(weights(toy[0]), weights(tmp_path / "run"))


def test_fresh_and_stale_differ_in_what_the_second_agent_learns_from(tmp_path, monkeypatch):
    """Agent B's contexts hold what the updated agent A writes (fresh), or what the old A wrote (stale)."""
    seen, update = {"fresh": [], "stale": []}, train.update
    for occupancy, contexts in seen.items():

        def spy(learner, batches, *rest, contexts=contexts):
            contexts.append([b.tokens.tolist() for b in batches])
            return update(learner, batches, *rest)

        monkeypatch.setattr(train, "update", spy)
        # A large first step, so that A's messages change.
        run(tmp_path / occupancy, "--occupancy", occupancy, "--delta", "inf", "--lr", "0.01", "--stages", "1")
    assert seen["fresh"][0] == seen["stale"][0] and seen["fresh"][1] != seen["stale"][1]


@pytest.mark.parametrize(
    "flags",
    [
        "--order reversed --ratio token --kl-estimator exact",
        "--order random --ratio mean --kl-estimator k1 --kl-unit token",
        "--router random --rounds 2 --beta 0 --eval-every 1",
        "--router without_b.py --diagnostics",
        "--agents 1 --delta inf",
        "--occupancy joint",
        "--dtype bf16",
        "--model relay,relay,relay --temperature 0.8",
    ],
)
def test_every_choice_runs_and_no_metrics_line_holds_a_null(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    source = "def router(turn, messages, agents, uniform):\n    return turn % 2 * 2\n"
    Path("without_b.py").write_text(source)
    _, updates, stages = run(Path("run"), *flags.split())
    assert "null" not in Path("run/metrics.jsonl").read_text()
    if "reversed" in flags:
        assert [u["agent"] for u in updates] == [2, 1, 0] * 2 and "kl_exact_after" in updates[0]
    if "--eval-every" in flags:
        assert ["accuracy_held_out" in stage for stage in stages] == [True, False]
    if "without_b" in flags:
        assert ["kl_after" in u for u in updates] == [True, False, True] * 2


def test_every_metrics_key_is_explained(tmp_path):
    flags = "--task convention --diagnostics --eval-every 1 --kl-estimator exact --stages 2".split()
    summary, updates, stages = run(tmp_path / "run", *flags)
    assert {"habits", "ess", "accuracy_held_out", "kl_exact_after"} <= updates[0].keys() | stages[0].keys()
    keys = set().union(summary, *updates, *stages)
    assert not [key for key in sorted(keys) if f"`{key}`" not in DOCS]


def test_a_team_learns(tmp_path):
    """The whole method at small size: two agents, a few seconds, well beyond what chance could give."""
    flags = "--agents 2 --stages 12 --problems 24 --group 8 --inner-steps 6 --eval-problems 512".split()
    summary, *_ = run(tmp_path / "run", *flags, "--lr", "5e-4", "--delta", "0.02")
    assert summary["accuracy_final"] > summary["accuracy_start"] + 0.25


@pytest.mark.parametrize("calls", [0, 150])
def test_a_run_that_fails_keeps_its_team_if_it_had_measured_anything(tmp_path, capsys, calls):
    router, out = tmp_path / "router.py", tmp_path / "run"
    router.write_text("calls = []\ndef router(turn, messages, agents, uniform):\n    calls.append(turn)\n"
                      f"    return 7 if len(calls) > {calls} else turn % agents\n")  # fmt: skip
    sentence = refusal(capsys, train.main, *TOY, "--out", str(out), "--router", str(router))
    assert "the router chose 7" in sentence and out.exists() == (calls > 0)
    if calls:
        assert "the router chose 7" in json.loads((out / "summary.json").read_text())["stopped"]
        assert (out / "agents" / "2" / "model.safetensors").is_file()


@pytest.mark.parametrize("fault, code", [("loss is nan", 1), ("interrupted", 130)])
def test_not_a_number_or_ctrl_c_stops_the_run_and_keeps_the_last_good_team(
    tmp_path, capsys, monkeypatch, fault, code
):
    out, original, calls = tmp_path / "run", train.group_advantages, itertools.count(1)

    def spoil(*arguments):
        if next(calls) < 5:
            return original(*arguments)
        if fault == "interrupted":
            raise KeyboardInterrupt
        return original(*arguments) * math.nan

    monkeypatch.setattr(train, "group_advantages", spoil)
    assert train.main([*TOY, "--out", str(out)]) == code
    assert fault in capsys.readouterr().err
    summary, updates, stages = results(out)
    assert summary["accuracy_final"] is None and fault in summary["stopped"]
    assert (len(updates), len(stages)) == (4, 1)
    assert all(torch.isfinite(p).all() for agent in weights(out) for p in agent.values())


def test_an_existing_output_directory_is_never_written_into(tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "is not empty; give another --out" in refusal(capsys, train.main, *TOY, "--out", str(mine))
    assert "cannot write to" in refusal(capsys, train.main, *TOY, "--out", str(mine / "thesis.tex"))
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
    assert (mine / "thesis.tex").read_text() == "years of work"


def blocks(language: str) -> list[str]:
    """Code blocks of the README and of docs/, lines that end in a backslash joined to the next."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS.replace("\\\n", " "), flags=re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Program and flags of every `python ...` in a bash block; lines of a shell loop are left out."""
    for line in "".join(blocks("bash")).splitlines():
        found = re.search(r"\bpython (?:-m )?(\S+)(.*)", line.split("#")[0])
        if found and "$" not in line:
            yield found[1], shlex.split(found[2])


MAINS = {  # program -> its function, and the flags before and after those printed that keep it small
    "train.py": (train.main, TOY, ["--stages", "1"]),
    "eval.py": (evaluation.main, [], ["--problems", "16", "--device", "cpu"]),
    "teamtr_min.studies.pretrain": (
        pretrain.main, [], ["--steps", "2", "--rows", "8", "--eval-problems", "8", "--out", "made"]
    ),
}  # fmt: skip


def test_the_commands_of_the_readme_and_the_docs_run(tmp_path, monkeypatch, capsys):
    """As printed, at toy size, in a directory that holds what they name; relay stands for other models."""
    monkeypatch.chdir(tmp_path)
    published = {True: tmp_path / "FILE", False: tmp_path / "HELD_OUT"}
    monkeypatch.setattr("teamtr_min.tasks.word_problems.local_copy", lambda name: published["train" in name])
    monkeypatch.setattr(WordProblems, "roles", lambda self, n: Relay(Config()).roles(n))  # in relay's words
    sums = [f"{i % 10}+{i // 10}" for i in range(60)]
    lines = [json.dumps({"question": text, "problem": text, "answer": "?"}) for text in sums]
    Path("DIR").mkdir()
    for file in ("DIR/train.jsonl", "DIR/test.jsonl", "FILE"):
        Path(file).write_text("\n".join(lines))
    Path("HELD_OUT").write_text("\n".join(lines[:20]))
    (own_task,) = (block for block in blocks("python") if "def task(" in block)
    Path("my_task.py").write_text(own_task)
    for name in ("NAME", "A", "B"):
        run(Path("runs", name), "--stages", "1")
    take_minutes, ran = {"kernels", "occupancy", "sampling", "training", "stage", "gpu"}, []
    drawn = {"report"} if importlib.util.find_spec("matplotlib") is None else set()
    for program, flags in commands():
        if program not in MAINS:
            assert importlib.util.find_spec(program), program
        elif not ({"--help"} | take_minutes | drawn) & set(flags):
            if "--model" in flags:
                flags[flags.index("--model") + 1] = "relay"
                flags = ["relay" if flag == "sums" else flag for flag in flags]  # which it cannot write
            main, before, after = MAINS[program]
            if "--replace" in flags:
                flags[flags.index("--replace") + 1], after = "1=relay", ["--stages", "2"]
            assert not main([*before, *flags, *after]), (program, flags, capsys.readouterr().err)
            ran.append(program)
    assert ran.count("train.py") > 4 and ran.count("eval.py") > 3
    run(Path("runs/own"), "--task", "my_task.py", "--stages", "1")
    lines = Path("runs/own/transcripts.jsonl").read_text().splitlines()
    assert lines and all(re.fullmatch(r"\d\+\d", json.loads(line)["text"]) for line in lines)


def test_the_first_command_works_as_a_program(tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), *TOY]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "held-out accuracy" in done.stdout, done.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    assert (directory / "summary.json").is_file()


def test_the_plot_and_sizes_read_well():
    lines = plot([0.0, 0.5, 1.0], height=4, width=3).splitlines()
    assert lines[0] == " 1.0 │  █" and lines[3].endswith("│ ██") and len(lines) == 5
    assert len(plot([0.3] * 500, width=60).splitlines()[0]) == 66
    assert size(1) == "1.0 B" and size(1536) == "1.5 KiB" and size(3.1 * 1024**3) == "3.1 GiB"
