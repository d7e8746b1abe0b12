"""Teams of different models: sizes, families and tokenizers of their own, all the way through a run."""

import shutil
from pathlib import Path

import pytest
import torch
from ready import team_of
from safetensors.torch import load_file, save_file
from tiny import MOVED, random_model, write_checkpoint, write_relabelled_tokenizer
from toy_runs import bits, parity, run

import train
from teamtr_min.engine import rng
from teamtr_min.extras.diagnostics import message_logps
from teamtr_min.hf.weights import RELAY
from teamtr_min.rollout import collect
from teamtr_min.tasks import Relay


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    """The shipped model, and a random one of another family, size and tokenizer, with padded vocabulary."""
    other = random_model("llama", vocab_size=28, max_positions=200)
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "other", other)
    return f"relay,{write_relabelled_tokenizer(directory)}"


@pytest.fixture(autouse=True)
def grade(monkeypatch):
    monkeypatch.setattr(Relay, "grade", parity)


FLAGS = ["--agents", "2", "--task", "relay", "--max-new-tokens", "7"]


@pytest.mark.parametrize("more", [
    "--rounds 2 --diagnostics --min-ess 0", "--dtype bf16 --occupancy joint --router random",
])  # fmt: skip
def test_a_team_of_two_kinds_trains_and_resumes_to_the_same_bits(pair, tmp_path, more):
    flags = [*FLAGS, "--model", pair, *more.split()]
    _, updates, _ = run(tmp_path / "whole", *flags)
    assert any(u["kl_after"] != 0 for u in updates if "kl_after" in u)
    assert all(u["sampler_mismatch_max"] < (1e-4 if "bf16" not in more else 0.5) for u in updates)
    assert "joint" not in more or [u["messages"] for u in updates] == [24, 24]
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "000002")
    shutil.rmtree(cut / "agents")
    assert train.main(["--resume", str(cut), "--model", pair]) == 0
    assert bits(cut) == bits(tmp_path / "whole")
    assert (cut / "agents/1/tokenizer.json").read_bytes() != (cut / "agents/0/tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory) -> Path:
    """The shipped model with every piece under another id: the same agent to all who read its text."""
    directory = Path(shutil.copytree(RELAY, tmp_path_factory.mktemp("models") / "relabelled"))
    tensors = load_file(write_relabelled_tokenizer(directory) / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    rows[MOVED] = rows[: len(MOVED)].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_the_numbering_of_tokens_changes_nothing(relabelled):
    texts, logps = [], []
    for model in ("relay", f"relay,{relabelled},relay"):
        _, team = team_of(model=model, agents=3, task="relay", temperature=0.0, max_new_tokens=16)
        problems = team.task.sample_problems(40, rng.generator(0, "problems"))
        rollouts = collect(team, problems, 1, rng.RngPath(0, "train"))
        texts.append([[m.text for m in messages] for messages in rollouts.messages])
        team.temperature = 1.0
        logps.append(sum(message_logps(team, rollouts, j, 4096) for j in range(3)))
    assert texts[0] == texts[1] and len({text for one in texts[0] for text in one}) > 40
    torch.testing.assert_close(*logps, rtol=0, atol=1e-4)
