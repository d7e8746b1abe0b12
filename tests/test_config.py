"""Every knob: its default, from Python and from the shell, and values that are refused before any work."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import refused

import train
from teamtr_min.config import PRESETS, Config, parse
from teamtr_min.occupancy import learning_rate


def test_the_configuration_loads_without_torch():
    code = "import sys, teamtr_min.config, teamtr_min.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent).returncode == 0


@pytest.mark.parametrize("model", ["relay", "convention", "qwen2.5-1.5b", "relay,qwen2.5-1.5b,relay"])
def test_presets_go_by_the_model_alike_from_python_and_from_the_shell(model):
    config = Config(model=model)
    assert config == parse(["--model", model], "") == dataclasses.replace(config)
    preset = PRESETS["pretrained" if "qwen" in model else "shipped"]
    assert preset == {name: getattr(config, name) for name in preset}
    for name in preset:  # a given value stands, and changes no other
        value = {"task": "7", "lr_end": 1}.get(name, 7)
        own = parse(["--model", model, f"--{name.replace('_', '-')}", str(value)], "")
        assert own == dataclasses.replace(config, **{name: value})


def test_a_task_brings_its_model_and_its_own_preset(tmp_path):
    models = [Config(task=task).model for task in ("relay", "convention", "gsm8k")]
    assert models == ["relay", "convention", "relay"]
    sums, lora = Config(model="m", task="sums"), Config(model="m", task="sums", lora_rank=8)
    assert (sums.delta, sums.group, sums.lr) == (0.05, 8, 2e-5) and lora.lr == pytest.approx(2e-4)
    (tmp_path / "adapter_config.json").touch()
    assert Config(model=str(tmp_path), task="sums").lr == lora.lr, "adapters to train on"


def test_fresh_and_corrected_are_one_rule():
    rules = {"": ("corrected", 0.5), "--occupancy fresh": ("fresh", 1.0), "--min-ess 1": ("fresh", 1.0)}
    rules |= {"--min-ess 0": ("corrected", 0.0), "--occupancy corrected --min-ess 0.8": ("corrected", 0.8)}
    rules |= {f"--occupancy {way}": (way, 0.0) for way in ("stale", "joint")}
    for flags, rule in (rules | {"--occupancy corrected": ("corrected", 0.5)}).items():
        config = parse(flags.split(), "")
        assert (config.occupancy, config.min_ess) == rule
        assert dataclasses.replace(config) == config


def test_config_json_is_strict_and_comes_back_with_defaults_for_knobs_that_it_lacks(tmp_path):
    config = parse("--delta inf --advantage-clip inf --diagnostics --kl none".split(), "")
    config.save(tmp_path / "config.json", fingerprint={"grader": "1"})
    text = (tmp_path / "config.json").read_text()
    assert "Infinity" not in text and json.loads(text)["delta"] == "inf"
    assert Config.load(tmp_path / "config.json") == config
    fields = dataclasses.asdict(Config(seed=5)) | {"forgotten": 1}
    del fields["clip"], fields["roles"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert Config.load(tmp_path / "config.json") == Config(seed=5)


def test_the_learning_rate_falls_as_half_a_cosine_to_its_end():
    rates = [learning_rate(Config(lr=10.0, lr_end=0.2), done / 4) for done in range(4)]
    assert rates == pytest.approx([10, 6 + 4 * 0.5**0.5, 6, 6 - 4 * 0.5**0.5])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--agents 0", "--agents is 0; the least possible value is 1"), ("--group 1", "--group is 1"),
        ("--agent 2", "unrecognized arguments: --agent 2; did you mean --agents?"),
        ("--agents three", "--agents: invalid int value: 'three'"), ("--delta nan", "--delta is nan"),
        ("--order zigzag", "--order 'zigzag' is not one of: fixed, reversed, random"),
        ("--delta 0", "--delta 0 allows no change"), ("--lr inf", "--lr is inf; the largest"),
        ("--lr-end 2", "--lr-end is 2.0; the largest"), ("--beta 5", "--beta lies between"),
        ("--kl adaptive --delta inf", "--kl adaptive needs"), ("--agents 9", "relay takes 1 to 8 turns"),
        ("--occupancy fresh --min-ess 0.5", "--occupancy fresh means --min-ess 1"),
        ("--occupancy stale --min-ess 0.5", "--min-ess is about --occupancy corrected"),
        ("--max-new-tokens 600", "the model has 512 positions"), ("--temperature 0", "nothing to compare"),
        ("--model relay,relay", "2 models for 3 agents"), ("--router nonesuch", "no router 'nonesuch'"),
        ("--roles nonesuch.json", "--roles nonesuch.json: not a JSON list"),
        ("--device cuda:77", "--device cuda:77 cannot be used here"),
        ("--date 26.07.2024", "--date 26.07.2024 is not a day such as 2026-11-30"),
        ("--task relay --model nonesuch", "no model 'nonesuch'"),
        ("--task convention --agents 1", "convention takes 2 to 4 turns"),
        ("--task sums --model relay --agents 4 --rounds 2", "sums takes 1 to 6 turns"),
        ("--task floors --model relay --rounds 2", "floors takes one turn per agent"),
        ("--task chess --model relay", "no task 'chess': give relay, convention, sums,"),
        ("--data x.jsonl", "relay makes its own problems"),
    ],
)  # fmt: skip
def test_impossible_values_are_a_sentence_before_any_work(tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    command = ["--device", "cpu", "--stages", "1", "--out", str(out), *flags.split()]
    assert message in refused(capsys, train.main, *command) and not out.exists()
