"""An agent is replaced in mid-run: the old run is only read, the new one is a run like any other."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import interrupt_at, refusal
from safetensors.torch import load_file
from tiny import random_model, write_checkpoint, write_relabelled_tokenizer
from toy_runs import parity, results, run, timeless

import eval as evaluation
import train
from teamtr_min.config import Config
from teamtr_min.run import replace
from teamtr_min.tasks import Relay

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--agents", "2", "--eval-problems", "16", "--delta", "0.02"]


@pytest.fixture(autouse=True)
def grade(monkeypatch):
    monkeypatch.setattr(Relay, "grade", parity)
    monkeypatch.setattr(replace, "PROBES", 24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has done its two stages, with steps bold enough that its agents are not as they were."""
    out, patch = tmp_path_factory.mktemp("runs") / "run", pytest.MonkeyPatch()
    patch.setattr(Relay, "grade", parity)
    run(out, *SHORT, "--kl", "fixed", "--lr", "1e-2")  # no radius, but one to align by
    patch.undo()
    return out


def contents(directory: Path) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def go_on(finished: Path, out: Path, *flags: str) -> dict:
    """Replace and train to stage 4; returns the line of the replacement."""
    assert train.main(["--resume", str(finished), "--stages", "4", "--out", str(out), *flags]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["kind"] == "replace")
    return line


def test_the_old_run_is_only_read_and_the_new_one_goes_on_from_it(finished, tmp_path, capsys):
    before, out = contents(finished), tmp_path / "new"
    line = go_on(finished, out, "--replace", "1=relay", "--align", "4")
    assert contents(finished) == before
    assert (line["agent"], line["model"], line["stage"]) == (1, "relay", 2)
    config, old = Config.load(out / "config.json"), Config.load(finished / "config.json")
    assert (config.model, config.stages, config.replace) == ("relay,relay", 4, "") and config.lr == old.lr
    summary, updates, _ = results(out)
    assert [u["stage"] for u in updates] == [0, 0, 1, 1, 2, 2, 3, 3] and summary["stages"] == 4
    for log in ("metrics.jsonl", "transcripts.jsonl"):
        assert (out / log).read_bytes().startswith((finished / log).read_bytes()[:500])
    text = capsys.readouterr().out
    assert text.count("agent 1 (B) is now relay: held-out accuracy") == 1 and "resumed after 2 of 4" in text


def test_without_a_name_it_stands_beside_the_old_run(finished, tmp_path, capsys):
    old = Path(shutil.copytree(finished, tmp_path / "run"))
    flags = ["--resume", f"{old}/", "--replace", "0=relay", "--align", "0", "--stages", "3"]
    assert train.main(flags) == 0 and (tmp_path / "run-replaced" / "summary.json").is_file()
    assert "not aligned" in capsys.readouterr().out
    before = contents(tmp_path)
    assert "exists and is not empty" in refusal(capsys, train.main, *flags)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("occupancy", ["fresh", "joint"])
def test_teammates_keep_masters_and_adam_and_the_newcomer_starts_anew(tmp_path, occupancy):
    old, out = tmp_path / "old", tmp_path / "new"
    run(old, *SHORT, "--occupancy", occupancy, "--kl", "fixed")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(1, patch, train, "group_advantages")
        flags = [
            "--resume",
            str(old),
            "--replace",
            "1=relay",
            "--align",
            "0",
            "--out",
            str(out),
            "--stages",
            "3",
        ]
        assert train.main(flags) == 130
    learner = "learner-0" if occupancy == "joint" else "learner-1"
    before, after = (load_file(d / f"checkpoints/000002/{learner}.safetensors") for d in (old, out))
    mine = "1." if occupancy == "joint" else "0."
    newcomers = {key for key in after if key.split(".", 2 if key[0] == "a" else 1)[-1].startswith(mine)}
    assert newcomers == {key for key in before if key.startswith(f"master.{mine}")}
    shipped = load_file(ROOT / "teamtr_min/assets/relay/model.safetensors")
    assert all(torch.equal(after[f"master.{mine}{name}"], p) for name, p in shipped.items())
    teammate = {key for key in after if key not in newcomers}
    assert all(torch.equal(after[key], before[key]) for key in teammate)
    if occupancy == "joint":
        assert any(key.startswith("adam.") for key in teammate)
    else:
        file = "checkpoints/000002/learner-0.safetensors"
        assert not teammate and (old / file).read_bytes() == (out / file).read_bytes()


def test_the_new_run_resumes_to_the_same_bits(finished, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--replace", "1=relay", "--align", "3"]
    line = go_on(finished, whole, *flags)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch, train, "group_advantages")
        assert train.main(["--resume", str(finished), "--stages", "4", "--out", str(cut), *flags]) == 130
    assert train.main(["--resume", str(cut)]) == 0
    again = [json.loads(one) for one in (cut / "metrics.jsonl").read_text().splitlines()]
    assert timeless([line]) == timeless([one for one in again if one["kind"] == "replace"])
    assert [timeless(r) for r in results(whole)[1:]] == [timeless(r) for r in results(cut)[1:]]
    files = [path.relative_to(whole) for path in whole.glob("agents/*/*")]
    assert files and all((whole / file).read_bytes() == (cut / file).read_bytes() for file in files)


def test_an_agent_replaced_by_itself_is_no_shock_and_needs_no_alignment(finished, tmp_path):
    line = go_on(finished, tmp_path / "new", "--replace", f"1={finished}/agents/1", "--align", "5")
    assert (
        line["shock_replaced"] == line["shock_aligned"] == 0 and line["outside"] == line["align_steps"] == 0
    )
    assert line["shock_replaced_ci"] == [0, 0] and line["accuracy_before"] == line["accuracy_aligned"]


def test_alignment_brings_the_newcomer_nearer_to_the_one_before(finished, tmp_path):
    line = go_on(finished, tmp_path / "new", "--replace", "1=relay", "--align", "30")
    assert line["shared_vocabulary"] and line["outside"] > 0.1 and line["probes"] == 24
    assert line["align_loss_after"] < 0.5 * line["align_loss_before"]


def test_a_newcomer_with_another_vocabulary_learns_from_text(finished, tmp_path, capsys):
    model = random_model("llama", vocab_size=25)
    other = write_relabelled_tokenizer(write_checkpoint(tmp_path / "other", model))
    line = go_on(finished, tmp_path / "new", "--replace", f"0={other}", "--align", "20")
    assert not line["shared_vocabulary"] and line["align_loss_after"] < 0.8 * line["align_loss_before"]
    assert "different vocabularies" in capsys.readouterr().out
    assert (tmp_path / "new/agents/0/tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_adapters_in_bf16_are_replaced_and_aligned_too(tmp_path):
    """Newcomer and teammates are adapters on frozen bases, the probes come after a warm start."""
    old, new = tmp_path / "old", tmp_path / "new"
    task = tmp_path / "task.py"
    task.write_text(
        "from teamtr_min.tasks import Demonstration, Relay\n"
        "class Shown(Relay):\n"
        "    def demonstrations(self, count, generator):\n"
        "        problems = self.sample_problems(count, generator)\n"
        "        return [Demonstration(p, [self.step(p.text), p.answer]) for p in problems]\n"
        "task = Shown\n"
    )
    kind = ["--lora-rank", "2", "--dtype", "bf16", "--warm-start", "3", "--task", str(task)]
    run(old, *SHORT, *kind, "--kl", "fixed", "--lr", "2e-3", "--warm-start-lr", "5e-2", "--model", "relay")
    line = go_on(old, new, "--replace", "1=relay", "--align", "20")
    assert line["stage"] == 2 and line["align_loss_after"] < line["align_loss_before"]
    assert (new / "agents/1/adapter_model.safetensors").is_file()


def test_every_key_of_the_line_is_documented(finished, tmp_path):
    line = go_on(finished, tmp_path / "new", "--replace", "1=relay", "--align", "1")
    section = (
        (ROOT / "docs/metrics.md").read_text().partition('(`kind` is "replace")')[2].partition("\n## ")[0]
    )
    assert section and not [key for key in line if key != "kind" and f"`{key}`" not in section]


def test_a_run_with_a_newcomer_is_evaluated_and_reported(finished, tmp_path):
    go_on(finished, tmp_path / "new", "--replace", "1=relay", "--align", "0")
    team = ["--team", str(tmp_path / "new")]
    assert evaluation.main(["relay", *team, "--problems", "4", "--mode", "solo"]) == 0
    pytest.importorskip("matplotlib", reason="draws")
    assert evaluation.main(["report", *team]) == 0


STAGES = ["--stages", "4"]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--replace", "1=relay"], "has done all of its 2 stages; give --stages of more than 2"),
        ([*STAGES, "--replace", "2=relay"], "no agent 2 to replace; the run's are numbered 0 to 1"),
        ([*STAGES, "--replace=-1=relay"], "--replace takes AGENT=MODEL"),
        ([*STAGES, "--replace", "relay"], "--replace takes AGENT=MODEL"),
        ([*STAGES, "--replace", "1=relay,relay"], "--replace takes AGENT=MODEL"),
        ([*STAGES, "--replace", "1=nonesuch"], "no model 'nonesuch'"),
        ([*STAGES, "--replace", "1=relay", "--align", "-1"], "--align is -1; the least"),
        ([*STAGES, "--replace", "1=relay", "--lr", "0.5"], "not with --lr 0.5 (the run has"),
        (STAGES, "not with --stages 4 (the run has 2)"),
        (["--align", "7"], "not with --align 7"),
    ],
)
def test_bad_input_is_a_sentence_and_changes_nothing(finished, capsys, flags, sentence):
    before = contents(finished.parent)
    assert sentence in refusal(capsys, train.main, "--resume", str(finished), *flags)
    assert contents(finished.parent) == before and not list(finished.parent.glob("*-replaced"))


def test_what_cannot_fit_is_refused_before_anything_is_loaded(finished, monkeypatch, capsys):
    before = contents(finished.parent)
    monkeypatch.setenv("TEAMTR_MEMORY", "64MiB")
    monkeypatch.setattr(replace, "load_team", None)
    sentence = refusal(capsys, train.main, "--resume", str(finished), *STAGES, "--replace", "1=relay")
    assert "this needs" in sentence and "a machine with more" in sentence
    assert contents(finished.parent) == before


def test_with_rates_of_their_own_an_agent_can_be_replaced_or_evaluated_alone(tmp_path, capsys):
    run(tmp_path / "run", *SHORT, "--lr-scale", "1,3")
    line = go_on(tmp_path / "run", tmp_path / "new", "--replace", "1=relay", "--align", "1")
    assert line["agent"] == 1
    flags = ["--team", str(tmp_path / "new"), "--problems", "4", "--mode", "solo", "--json"]
    assert evaluation.main(["relay", *flags]) == 0


def test_there_must_be_a_run_to_replace_in(finished, tmp_path, capsys):
    assert "--resume RUN" in refusal(capsys, train.main, "--replace", "1=relay")
    assert "--resume RUN" in refusal(capsys, train.main, "--align", "7")
    flags = ["--replace", "1=relay", *STAGES, "--out", str(tmp_path / "new"), "--resume"]
    with (finished / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "being written" in refusal(capsys, train.main, *flags, str(finished))
    bare = shutil.copytree(finished, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    assert "has no checkpoint yet" in refusal(capsys, train.main, *flags, str(bare))
    assert not (tmp_path / "new").exists()
