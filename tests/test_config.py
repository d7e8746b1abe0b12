"""Every knob: its default, from Python and from the shell, and what it refuses before any work."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refusal
from toy_runs import TOY

import eval as evaluation
import train
from teamtr_min import cli
from teamtr_min.config import PRESETS, TASK_PRESETS, Config
from teamtr_min.occupancy import learning_rate

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", ["teamtr_min.config", "teamtr_min.cli"])
def test_the_configuration_loads_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("model", ["relay", "convention", "qwen2.5-1.5b", "relay,qwen2.5-1.5b,relay"])
def test_presets_go_by_the_model_alike_from_python_and_from_the_shell(model):
    config = Config(model=model)
    assert config == cli.parse(["--model", model], "") == dataclasses.replace(config)
    preset = PRESETS["pretrained" if "qwen" in model else "shipped"]
    assert preset == {name: getattr(config, name) for name in preset}
    assert config.lr == (1e-6 if "qwen" in model else 5e-4)
    for name in preset:  # a value of one's own stands, and changes no other
        value = {"task": "7", "lr_end": 1}.get(name, 7)
        flag = [f"--{name.replace('_', '-')}", str(value)]
        own = Config(model=model, **{name: value})
        assert own == cli.parse(["--model", model, *flag], "") == dataclasses.replace(config, **{name: value})
        assert dataclasses.asdict(own) == dataclasses.asdict(config) | {name: value}


def test_a_task_brings_its_model():
    models = [Config(task=task).model for task in ("relay", "convention", "gsm8k")]
    assert models == ["relay", "convention", "relay"]
    assert (
        Config(model="qwen2.5-1.5b").task == "gsm8k" and Config(model="relay,relay", agents=2).task == "relay"
    )


@pytest.mark.parametrize(
    "flags, fields",
    [
        ("--occupancy every_k", {"every": 2}),
        ("--occupancy every_k --every 3", {"every": 3}),
        ("--kl none", {"kl": "fixed", "beta": 0.0}),
        ("--no-advantage-clip", {"advantage_clip": math.inf}),
        ("--no-group-norm --diagnostics", {"no_group_norm": True, "diagnostics": True}),
    ],
)
def test_what_the_shell_says_shorter_python_says_too(flags, fields, tmp_path):
    config = Config(**fields)
    assert cli.parse(flags.split(), "") == config
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


def test_the_learning_rate_falls_as_half_a_cosine_to_its_end():
    rates = [
        learning_rate(Config(agents=2, stages=2, lr=10.0, lr_end=0.2, lr_scale=scale), stage, i, [i])
        for scale in ("", "1,3")
        for stage in (0, 1)
        for i in (0, 1)
    ]
    equal = [10, 6 + 4 * 0.5**0.5, 6, 6 - 4 * 0.5**0.5]
    assert rates == pytest.approx([*equal, equal[0], 3 * equal[1], equal[2], 3 * equal[3]])


@pytest.mark.parametrize("main, flag", [(train.main, "--resume"), (evaluation.main, "--team")])
def test_a_configuration_of_another_version_is_refused_with_the_fields_that_differ(
    tmp_path, capsys, main, flag
):
    fields = dataclasses.asdict(Config(stages=1, eval_problems=1)) | {"learning_rate": 1.0}
    del fields["lr"], fields["beta"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    sentence = refusal(capsys, main, flag, str(tmp_path))
    assert "missing: beta, lr; unknown: learning_rate" in sentence and str(tmp_path) in sentence


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--agents 0", "--agents is 0; the least possible value is 1"),
        ("--agents 9", "at most 8 operations"),
        ("--group 1", "--group is 1"),
        ("--delta 0", "--delta 0 allows no change"),
        ("--delta nan", "--delta is nan"),
        ("--lr inf", "--lr must be finite"),
        ("--lr-end 2", "--lr-end is 2; it is a fraction of --lr, from 0 to 1"),
        ("--beta 5", "--beta is 5; it lives between"),
        ("--kl none --beta 0.1", "--kl none means --beta 0"),
        ("--no-advantage-clip --advantage-clip 1", "--no-advantage-clip means --advantage-clip inf"),
        ("--kl adaptive --delta inf", "--kl adaptive needs"),
        ("--occupancy stale --every 2", "with --occupancy stale it does nothing"),
        ("--occupancy joint --resample suffix", "nothing is sampled again"),
        ("--max-new-tokens 600", "leaves no room in the 512 positions"),
        ("--temperature 0", "nothing to compare"),
        ("--model relay,relay", "2 models for 3 agents"),
        ("--task relay --model nonesuch", "no model 'nonesuch'"),
        ("--task relay --model nobody/nothing", "nobody/nothing at main is not in the Hugging Face cache"),
        ("--router nonesuch", "no router 'nonesuch'"),
        ("--device meta", "only cpu, cuda and mps can"),
        ("--device cuda:77", "--device cuda:77 cannot be used here"),
        ("--device abacus", "--device abacus cannot be used here"),
    ],
)
def test_impossible_values_are_a_sentence_before_any_work(tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert message in refusal(capsys, train.main, *TOY, "--out", str(out), *flags.split())
    assert not out.exists()


@pytest.mark.parametrize(
    "mode, message", [("fast", "must be auto, triton or torch"), ("triton", "needs Triton and")]
)
def test_kernels_that_cannot_run_are_a_sentence_before_any_work(tmp_path, capsys, monkeypatch, mode, message):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    monkeypatch.setenv("TEAMTR_KERNELS", mode)
    out = tmp_path / "run"
    assert message in refusal(capsys, train.main, *TOY, "--out", str(out)) and not out.exists()


@pytest.mark.parametrize("flags", ["--learning-rate 1", "--agents three", "--order zigzag", "--agent 2"])
def test_unknown_flags_and_words_are_errors(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(flags.split(), "")
    assert stop.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_help_prints_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    told = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    assert stop.value.code == 0
    for f in dataclasses.fields(Config):
        text = told[f"--{f.name.replace('_', '-')}"]
        if f.name in PRESETS["shipped"]:
            shipped, pretrained = (preset[f.name] for preset in PRESETS.values())
            special = [
                f"; {preset[f.name]} on {task}" for task, preset in TASK_PRESETS.items() if f.name in preset
            ]
            assert f"(default {shipped}; {pretrained} for pretrained models{''.join(special)})" in text
        elif f.default not in ("", None):
            assert f"(default {'off' if f.default is False else f.default})" in text
