"""Weights spread over processes (`--shard`): less memory, the same run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import evaluate, refusal
from safetensors.torch import load_file
from several_runs import commands, together
from shards_by_rank import check_all
from test_memory import SHAPES
from test_ranks import ROOT, TOY, stop_after
from toy_runs import results

import train
from teamtr_min.config import Config
from teamtr_min.engine.distributed import Ranks
from teamtr_min.run.memory import Needs
from teamtr_min.run.shapes import parameters
from teamtr_min.run.system import size

EVAL = ["relay", "--problems", "5", "--k", "2", "--again", "--json", "--shard"]
# What ranks may do unequally often: turns of one agent, waves of rows, batches, forward passes of weights.
UNEVEN = (
    "--router random --rounds 2 --occupancy importance --batch-tokens 64 --batch-rows 3 --stages 1".split()
)
EXACT = "--kl-estimator exact --resample suffix --warm-start 2 --warm-start-lr 3e-5 --stages 1".split()


def test_each_rank_holds_a_part_and_gradients_are_those_of_one_process(tmp_path):
    """Odd sizes, every family, tied or not, activations recomputed; ranks go back unequally often."""
    together(3, tmp_path, check_all)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Toy runs by one process with whole weights and by two with spread ones."""
    root = tmp_path_factory.mktemp("shards")
    kinds = {"plain": [], "uneven": UNEVEN, "exact": EXACT}
    for name, flags in kinds.items():
        assert train.main([*TOY, *flags, "--out", str(root / f"{name}-1")]) == 0
    lines = [["train", *TOY, *f, "--shard", "--out", str(root / f"{n}-2")] for n, f in kinds.items()]
    spread = stop_after(1, root / "plain-1", root / "resumed")
    lines += [
        ["train", "--resume", str(spread), "--shard"],
        ["eval", *EVAL, "--team", str(root / "plain-1")],
    ]
    said = together(2, root, commands, *lines)
    shutil.rmtree(spread / "checkpoints" / "000003")
    assert train.main(["--resume", str(spread)]) == 0  # alone a process has nobody to spread to
    return {"root": root, "said": said}


@pytest.mark.parametrize("name", ["plain", "uneven", "exact", "resumed"])
def test_spread_or_whole_the_run_is_the_same(runs, name):
    root = runs["root"]
    alone, spread = root / f"{name.replace('resumed', 'plain')}-1", root / f"{name}-2"
    spread = root / "resumed" if name == "resumed" else spread
    assert (alone / "transcripts.jsonl").read_text() == (spread / "transcripts.jsonl").read_text()
    for one, other in zip(results(alone)[1], results(spread)[1], strict=True):
        for key in {key for key in one if not key.startswith(("kind", "seconds"))}:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    files = ["model.safetensors", *(path.name for path in (alone / "checkpoints").iterdir())]
    assert len(files) > 1
    for j in range(2):
        names = [f"agents/{j}/model.safetensors"]
        names += [f"checkpoints/{done}/learner-{j}.safetensors" for done in files[1:]]
        for file in names:
            a, b = load_file(alone / file), load_file(spread / file)
            assert a.keys() == b.keys()
            for key, x in a.items():
                assert b[key].shape == x.shape and b[key].dtype == x.dtype
                bound = 1e-5 if "adam" not in key else 1e-3 * x.abs().max().item()
                assert (b[key] - x).abs().max().item() <= bound, (file, key)


def test_spread_weights_are_evaluated_as_whole_ones(runs, capsys):
    shared = json.loads(runs["said"][-2])
    alone = evaluate(capsys, *EVAL[:-2], "--team", str(runs["root"] / "plain-1"))
    for key in ("avg_at_k", "pass_at_k", "tokens_sampled", "team_hash", "task_hash"):
        assert shared[key] == alone[key]


@pytest.mark.parametrize("flags", ["--lora-rank 2", "--diagnostics", "--occupancy joint"])
def test_what_needs_whole_weights_is_refused(capsys, flags):
    assert "--shard does not go together with" in refusal(capsys, train.main, "--shard", *flags.split())


def row_of_scale(name: str, processes: int) -> str:
    """As docs/scale.md has it: three agents in bf16, on one of so many GPUs."""
    m, config = SHAPES[name], Config(model=name, agents=3, device="cuda", shard=True)
    n, ranks = parameters(m), Ranks(0, processes, processes)
    weights = 4 * -(-3 * n // processes)
    needs = Needs(config, torch.device("cuda"), 2, [m] * 3, [n] * 3, weights, longest=1, ranks=ranks)
    parts = needs.weights, needs.states([0]), needs.points([0]), needs.gathered(m, 8)
    return f"| {' | '.join([name, str(processes), *map(size, parts), size(sum(parts))])} |"


def test_the_table_of_scale_follows_from_the_plan():
    page = Path(ROOT / "docs" / "scale.md").read_text()
    for name in ("qwen2.5-1.5b", "qwen2.5-7b"):
        for processes in (8, 64, 512):
            assert row_of_scale(name, processes) in page
