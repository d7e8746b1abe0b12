"""train.py and eval.py called in this process, at toy size, and what a run leaves behind."""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import eval as evaluation
import train

# 3 agents, 2 stages, 12 rollouts per collection; steps large enough that every agent changes its messages.
TOY = ["--agents", "3", "--stages", "2", "--problems", "3", "--group", "4", "--inner-steps", "2",
       "--eval-problems", "8", "--lr", "3e-3", "--delta", "0.5", "--device", "cpu"]  # fmt: skip


def run(out: Path, *flags: str) -> tuple[dict, list[dict], list[dict]]:
    """Train in this process; returns the summary, the updates and the stages."""
    assert train.main([*TOY, "--out", str(out), *flags]) == 0
    return results(out)


def lines(out: Path, kind: str) -> list[dict]:
    metrics = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in metrics if line["kind"] == kind]


def results(out: Path) -> tuple[dict, list[dict], list[dict]]:
    return json.loads((out / "summary.json").read_text()), lines(out, "update"), lines(out, "stage")


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "memory"))} for r in records]


def weights(out: Path) -> list[dict]:
    return [load_file(out / "agents" / str(j) / "model.safetensors") for j in range(3)]


def same(a: list[dict], b: list[dict]) -> bool:
    return all(torch.equal(p[name], q[name]) for p, q in zip(a, b) for name in p)


def contents(directory: Path) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def bits(out: Path) -> tuple:
    """All that two equal runs have in common: logs and summary but for times, agents, the last checkpoint."""
    summary, updates, stages = results(out)
    files = [*out.glob("agents/*/*"), *sorted(out.glob("checkpoints/*"))[-1].glob("*.safetensors")]
    held = {str(file.relative_to(out)): file.read_bytes() for file in files}
    return timeless([summary, *updates, *stages]), (out / "transcripts.jsonl").read_bytes(), held


def refused(capsys, main, *flags: str) -> str:
    """The one sentence with which a command refuses these flags."""
    capsys.readouterr()
    assert main([*flags]) == 2
    plan = "memory  ", " " * 8  # how its lines begin
    said = capsys.readouterr().err.splitlines(keepends=True)
    sentence = "".join(line for line in said if not line.startswith(plan))
    assert sentence.startswith("error: ") and sentence.count("\n") == 1, said
    return sentence


def printed(capsys, *flags: str) -> str:
    capsys.readouterr()
    assert evaluation.main([*flags]) == 0
    return capsys.readouterr().out


def evaluate(capsys, *flags: str) -> dict:
    return json.loads(printed(capsys, *flags, "--json"))


def interrupt_at(call: int, monkeypatch, owner, name: str) -> None:
    """Ctrl-C instead of the `call`-th call, from 1, of a function of this module."""
    original, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments, **named):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)
