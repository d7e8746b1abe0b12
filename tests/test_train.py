"""The commands, as people type them, at toy size: what they write, that they repeat, and what they refuse."""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from teamtr_min import load_model, rng
from teamtr_min.config import Config
from teamtr_min.run.run import plot, size, violation_rate
from teamtr_min.studies import pretrain
from teamtr_min.tasks import Relay

ROOT = Path(__file__).parent.parent
TOY = ["--agents", "2", "--stages", "2", "--problems", "4", "--group", "4", "--inner-steps", "2",
       "--eval-problems", "32", "--device", "cpu"]  # fmt: skip


def run(out: Path, *flags: str) -> tuple[dict, list[dict]]:
    """Train in this process; returns the summary and the metrics."""
    assert train.main([*TOY, "--out", str(out), *flags]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), metrics


def without_time(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith("seconds")}


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    summary, metrics = run(out)
    return out, summary, metrics


def test_a_run_writes_what_it_promises(toy_run):
    out, summary, metrics = toy_run
    wanted = {"config.json", "metrics.jsonl", "transcripts.jsonl", "summary.json", "agents", "checkpoints"}
    assert {p.name for p in out.iterdir()} == wanted
    assert [m["kind"] for m in metrics] == ["update", "update", "stage"] * 2
    assert [(m["stage"], m["agent"]) for m in metrics if m["kind"] == "update"] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert summary["stages"] == 2 and summary["rollouts"] == 2 * 2 * 16 and summary["stopped"] is None
    assert summary["tokens_sampled"] == sum(m.get("tokens_sampled", 0) for m in metrics)
    assert summary["tokens_trained"] == sum(m.get("tokens_trained", 0) for m in metrics) > 0
    assert summary["violation_rate_after"] == 0
    for m in metrics:
        if m["kind"] == "update":
            assert m["kl_after"] <= m["delta"] and m["messages"] == 16
            assert m["sampler_mismatch_max"] < 1e-3 and m["entropy"] > 0 and m["grad_norm"] > 0
    for line in (out / "transcripts.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"id", "text", "answer", "messages", "return", "stage", "split"} == set(record)
        assert [m["agent"] for m in record["messages"]] == [0, 1]
        assert Relay.is_held_out(record["text"]) == (record["split"] == "held-out")
        assert record["return"] == float(record["messages"][-1]["text"] == record["answer"])


def test_the_schedule_and_the_draws_are_those_of_the_place(toy_run, tmp_path):
    """Cosine decay over all updates; draws of its own for each; a random order that changes."""
    lrs = [m["lr"] for m in toy_run[2] if m["kind"] == "update"]
    assert lrs == pytest.approx([2.5e-4 * (1 + math.cos(math.pi * u / 4)) for u in range(4)])
    config = Config(agents=5, order="random")
    orders = [train.update_order(config, stage) for stage in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(map(tuple, orders))) > 10
    assert orders == [train.update_order(config, stage) for stage in range(20)]
    # The same team before both updates: what differs is the draws.
    _, metrics = run(tmp_path / "still", "--lr", "0", "--stages", "1", "--problems", "32")
    first, second = (m["return_mean"] for m in metrics if m["kind"] == "update")
    assert first != second and abs(first - second) < 0.2


def test_the_knobs_of_the_advantage_reach_it(tmp_path, monkeypatch):
    seen, original = [], train.group_advantages
    monkeypatch.setattr(train, "group_advantages", lambda *a: seen.append(a[1:]) or original(*a))
    run(tmp_path / "run", "--advantage-clip", "0.7", "--eps-norm", "0.01", "--stages", "1")
    run(tmp_path / "plain", "--no-advantage-clip", "--no-group-norm", "--stages", "1")
    assert seen == [(0.7, 0.01, True)] * 2 + [(math.inf, 1e-6, False)] * 2


def test_violation_rates_count_what_passed_its_radius():
    updates = [{"delta": 0.02, "kl": kl} for kl in (0.01, 0.03, 0.02, 0.5)] + [{"delta": None, "kl": None}]
    assert violation_rate(updates, "kl") == 0.5 and violation_rate([], "kl") is None
    assert violation_rate([{"delta": None, "kl": 9.0}], "kl") is None  # nothing to violate


def test_what_was_cut_off_is_counted(tmp_path):
    _, metrics = run(tmp_path / "run", "--max-new-tokens", "3")
    assert (
        metrics[0]["truncated"] > 0.5 and metrics[0]["message_tokens"] == 3 and metrics[1]["truncated"] < 0.5
    )


def test_a_run_that_fails_later_keeps_its_team(tmp_path, capsys):
    router = tmp_path / "router.py"
    router.write_text("calls = []\ndef router(turn, messages, agents, uniform):\n    calls.append(turn)\n"
                      "    return 7 if len(calls) > 150 else turn % agents\n")  # fmt: skip
    out = tmp_path / "run"
    assert train.main([*TOY, "--out", str(out), "--router", str(router)]) == 2
    assert "the router chose 7" in capsys.readouterr().err
    assert "the router chose 7" in json.loads((out / "summary.json").read_text())["stopped"]
    assert (out / "agents" / "1" / "model.safetensors").is_file()


def test_a_run_that_fails_before_its_first_measurement_leaves_nothing(tmp_path, capsys):
    router = tmp_path / "router.py"
    router.write_text("def router(turn, messages, agents, uniform):\n    return 7\n")
    assert train.main([*TOY, "--out", str(tmp_path / "run"), "--router", str(router)]) == 2
    assert not (tmp_path / "run").exists()


def test_every_metrics_key_is_explained_in_the_readme(toy_run):
    text = (ROOT / "README.md").read_text()
    keys = {key for m in toy_run[2] for key in m} | set(toy_run[1])
    assert not [key for key in keys if f"`{key}`" not in text]


def test_the_saved_agents_are_those_that_accuracy_final_was_read_from(toy_run, capsys):
    out, summary, _ = toy_run
    capsys.readouterr()
    assert evaluation.main(["relay", "--team", str(out), "--problems", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["avg_at_k"] == pytest.approx(summary["accuracy_final"], abs=0.3)
    config = Config.load(out / "config.json")
    task = Relay(config)
    sources = [out / "agents" / str(j) for j in range(2)]
    from teamtr_min.rollout import collect
    from teamtr_min.team import load_team

    team = load_team(config, task.roles(2), sources)
    problems = task.sample_problems(32, rng.generator(0, "held-out"), held_out=True)
    again = collect(team, problems, 1, task.grade, config, ("held-out", 2))
    assert again.accuracy == summary["accuracy_final"]


def test_the_same_seed_gives_the_same_bits(toy_run, tmp_path):
    out, summary, metrics = toy_run
    summary2, metrics2 = run(tmp_path / "again")
    assert list(map(without_time, metrics)) == list(map(without_time, metrics2))
    assert without_time(summary) == without_time(summary2)
    for j in range(2):
        a, b = load_model(out / "agents" / str(j)), load_model(tmp_path / "again" / "agents" / str(j))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    _, other = run(tmp_path / "other", "--seed", "1")
    assert other[0]["kl_after"] != metrics[0]["kl_after"]


def test_sampling_fewer_rows_at_once_trains_the_same_team(toy_run, tmp_path):
    _, metrics = run(tmp_path / "run", "--batch-rows", "5")
    for a, b in zip(toy_run[2], metrics):
        a, b = ({k: v for k, v in without_time(m).items() if "mismatch" not in k} for m in (a, b))
        assert a == b


def test_fresh_and_stale_differ_in_what_the_second_agent_learns_from(toy_run, tmp_path, monkeypatch):
    """Agent B's contexts hold what the updated agent A writes (fresh), or what the old A wrote (stale)."""
    seen = {"fresh": [], "stale": []}
    original = train.update_agent
    for occupancy in seen:

        def spy(learner, batches, config, lr, kept=seen[occupancy]):
            kept.append([b.tokens.tolist() for b in batches])
            return original(learner, batches, config, lr)

        monkeypatch.setattr(train, "update_agent", spy)
        # A large first step, so that A's messages change.
        flags = ["--occupancy", occupancy, "--delta", "inf", "--lr", "0.01", "--stages", "1"]
        summary, metrics = run(tmp_path / occupancy, *flags)
        updates = [m for m in metrics if m["kind"] == "update"]
        assert [m["rollouts"] for m in updates] == ([16, 16] if occupancy == "fresh" else [16, 0])
        assert summary["rollouts"] == sum(m["rollouts"] for m in updates)
    assert seen["fresh"][0] == seen["stale"][0]
    assert seen["fresh"][1] != seen["stale"][1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--order", "reversed", "--ratio", "token", "--kl-estimator", "exact"],
        ["--order", "random", "--ratio", "mean", "--kl-estimator", "k1", "--kl-unit", "token"],
        ["--router", "random", "--rounds", "2", "--beta", "0", "--eval-every", "1"],
        ["--agents", "1", "--delta", "inf"],
        ["--dtype", "bf16"],
        ["--model", "relay,relay", "--temperature", "0.8"],
    ],
)
def test_every_choice_runs(tmp_path, flags):
    _, metrics = run(tmp_path / "run", *flags)
    updates = [m["agent"] for m in metrics if m["kind"] == "update"]
    if "reversed" in flags:
        assert updates == [1, 0, 1, 0] and metrics[0]["kl_exact_after"] is not None
    if "--eval-every" in flags:
        assert [m["accuracy_held_out"] is None for m in metrics if m["kind"] == "stage"] == [False, True]


def test_a_team_learns(tmp_path):
    """The whole method at small size: two agents, a few seconds, well beyond what chance could give."""
    flags = {"stages": 12, "problems": 24, "group": 8, "inner-steps": 6, "eval-problems": 512}
    summary, _ = run(tmp_path / "run", *(word for k, v in flags.items() for word in (f"--{k}", str(v))))
    assert summary["accuracy_final"] > summary["accuracy_start"] + 0.25


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--agents", "0"], "--agents is 0; the least possible value is 1"),
        (["--agents", "9"], "at most 8 operations"),
        (["--group", "1"], "--group is 1"),
        (["--delta", "0"], "--delta 0 allows no change"),
        (["--delta", "nan"], "--delta is nan"),
        (["--lr", "inf"], "--lr must be finite"),
        (["--beta", "5"], "--beta is 5; it lives between"),
        (["--max-new-tokens", "600"], "leaves no room in the 512 positions"),
        (["--device", "meta"], "only cpu, cuda and mps can"),
        (["--temperature", "0"], "nothing to compare"),
        (["--model", "relay,relay,relay"], "3 models for 2 agents"),
        (["--model", "nonesuch"], "no model 'nonesuch'"),
        (["--model", "nobody/nothing"], "nobody/nothing at main is not in the Hugging Face cache"),
        (["--router", "nonesuch"], "no router 'nonesuch'"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
    ],
)
def test_impossible_values_are_a_sentence_before_any_work(tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert train.main([*TOY, "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "mode, message", [("fast", "must be auto, triton or torch"), ("triton", "needs Triton and")]
)
def test_kernels_that_cannot_run_are_a_sentence_before_any_work(tmp_path, capsys, monkeypatch, mode, message):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    monkeypatch.setenv("TEAMTR_KERNELS", mode)
    assert train.main([*TOY, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [["--learning-rate", "1"], ["--agents", "three"], ["--order", "zigzag"], ["--agent", "2"]]
)
def test_unknown_flags_and_words_are_errors(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_an_existing_output_directory_is_never_written_into(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert train.main([*TOY, "--out", str(tmp_path / "mine")]) == 2
    assert "is not empty; give another --out" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert train.main([*TOY, "--out", str(tmp_path / "mine" / "thesis.tex")]) == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("interrupt", [False, True])
def test_not_a_number_or_ctrl_c_stops_the_run_and_keeps_the_last_good_team(
    tmp_path, capsys, monkeypatch, interrupt
):
    out, original = tmp_path / "run", train.group_advantages

    def spoil(returns, *rest):
        advantage = original(returns, *rest)
        spoil.calls += 1
        if interrupt and spoil.calls == 4:
            raise KeyboardInterrupt
        return advantage * float("nan") if spoil.calls == 4 else advantage

    spoil.calls = 0
    monkeypatch.setattr(train, "group_advantages", spoil)
    assert train.main([*TOY, "--out", str(out)]) == (130 if interrupt else 1)
    assert interrupt or "stopped: loss is nan" in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy_final"] is None
    assert ("interrupted" if interrupt else "loss is nan") in summary["stopped"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    for j in range(2):
        assert all(torch.isfinite(p).all() for p in load_model(out / "agents" / str(j)).parameters())


def test_help_prints_every_flag_with_its_default():
    text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    text = " ".join(text.split())
    for f in dataclasses.fields(Config):
        assert f"--{f.name.replace('_', '-')} " in text
        if f.default != "":
            assert f"(default {'off' if f.default is False else f.default}" in text


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def readme_commands() -> list[list[str]]:
    """The words of every `python ...` line in the README's code blocks."""
    lines = [
        line.split("#")[0].split("&&")[-1].strip() for b in readme_blocks("bash") for line in b.splitlines()
    ]
    return [line.split() for line in lines if line.startswith("python ")]


def test_the_readmes_commands_run(tmp_path, monkeypatch, capsys):
    """As printed, at toy size, in a directory of their own; a hub model is replaced by one at hand."""
    stories = ROOT.parent / "shared" / "data" / "stories260K" / "hf_qwen2"
    monkeypatch.chdir(tmp_path)
    for side in ("train", "test"):
        lines = [json.dumps({"question": f"{i}?", "problem": f"{i}?", "answer": i}) for i in range(40)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(lines))
    names = {"runs/NAME": "runs/0", "DIR": ".", "FILE": "train.jsonl", "16": "1"}  # one stage of sixteen
    mains = {"train.py": train.main, "eval.py": evaluation.main}
    ran = set()
    for i, (_, *words) in enumerate(readme_commands()):
        if "report" in words and importlib.util.find_spec("matplotlib") is None:
            continue
        program = words[0] if words[0] != "-m" else words[1]
        flags = [names.get(w, w) for w in words[1 if program in mains else 2 :]]
        if "qwen2.5-1.5b" in flags:
            model = "relay" if "--task" not in flags else str(stories)
            flags[flags.index("qwen2.5-1.5b")] = model
            if "--task" in flags and not stories.is_dir():
                continue  # a model that reads English is not at hand
            flags += ["--max-new-tokens", "8", "--lr", "1e-4"]
        if program == "train.py" and not {"--help", "--resume"} & set(flags):
            toy = dict(zip(TOY[::2], TOY[1::2])) | {"--stages": "1", "--out": f"runs/{i}"}
            flags += [w for name, value in toy.items() if name not in flags for w in (name, value)]
        if program == "eval.py":
            flags += ["--problems", "16", "--device", "cpu"]
        if program in mains:
            try:
                assert mains[program](flags) == 0, (words, capsys.readouterr().err)
            except SystemExit as stop:
                assert stop.code == 0 and "--help" in flags
        elif program == "teamtr_min.studies.pretrain":
            pretrain.main(
                [
                    *flags,
                    "--steps",
                    "2",
                    "--rows",
                    "8",
                    "--eval-problems",
                    "8",
                    "--out",
                    str(tmp_path / "made"),
                ]
            )
        else:
            assert program == "pytest"
        ran.add(program)
    assert ran == {"train.py", "eval.py", "pytest", "teamtr_min.studies.pretrain"}


def test_the_first_command_works_as_a_program(tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), *TOY]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "held-out accuracy" in done.stdout, done.stderr
    (run_directory,) = (tmp_path / "runs").iterdir()
    assert (run_directory / "summary.json").is_file()


def test_the_readmes_task_of_ones_own_runs(tmp_path):
    (example,) = readme_blocks("python")
    (tmp_path / "my_task.py").write_text(example)
    run(tmp_path / "run", "--task", str(tmp_path / "my_task.py"))
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "run" / "transcripts.jsonl").read_text().splitlines()
    ]
    assert texts and all(re.fullmatch(r"\d\+\d", text) for text in texts)


def test_pretraining_is_reproducible(tmp_path, capsys):
    for name in ("a", "b"):
        pretrain.main(["--out", str(tmp_path / name), "--steps", "3", "--rows", "8", "--eval-problems", "16"])
    text = capsys.readouterr().out
    assert all(f"start accuracy, {n} agent" in text for n in range(1, 9))
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["relay", "convention"])
def test_a_shipped_model_is_small_and_its_tokenizer_is_what_pretrain_writes(name, tmp_path):
    pretrain.write_tokenizer(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (pretrain.ASSETS / name / file).read_bytes()
    assert sum(p.stat().st_size for p in (pretrain.ASSETS / name).iterdir()) < 1e6


def test_the_plot_and_sizes_read_well():
    lines = plot([0.0, 0.5, 1.0], height=4, width=3).splitlines()
    assert lines[0] == " 1.0 │  █" and lines[3].endswith("│ ██") and len(lines) == 5
    assert len(plot([0.3] * 500, width=60).splitlines()[0]) == 66
    assert size(1) == "1.0 B" and size(1536) == "1.5 KiB" and size(3.1 * 1024**3) == "3.1 GiB"
