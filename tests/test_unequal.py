"""Teams of different models: sizes, families and tokenizers of their own, all the way through a run."""

import shutil

import pytest
from tiny import random_model, write_checkpoint, write_relabelled_tokenizer
from toy_runs import bits, run

import train


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    """The shipped model, and a random one of another family, size and tokenizer, with padded vocabulary."""
    other = random_model("llama", vocab_size=28, max_positions=200)
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "other", other)
    return f"relay,{write_relabelled_tokenizer(directory)}"


@pytest.mark.parametrize("more", [
    "--rounds 2 --diagnostics --min-ess 0", "--dtype bf16 --occupancy joint --router random",
])  # fmt: skip
def test_a_team_of_two_kinds_trains_and_resumes_to_the_same_bits(pair, half_right, tmp_path, more):
    flags = [*"--agents 2 --task relay --max-new-tokens 7 --model".split(), pair, *more.split()]
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
