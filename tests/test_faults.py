"""Damaged files, full disks, closed outputs, hostile models: a sentence each, and nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import evaluate, refusal
from tiny import random_model, write_checkpoint, write_tokenizer
from tiny import refusal as refused
from toy_runs import TOY, run, same, weights

import eval as evaluation
import train
from teamtr_min import load_model, load_tokenizer, save_model
from teamtr_min.config import Config
from teamtr_min.files import SUMS, UserError
from teamtr_min.hf.weights import hash_weights
from teamtr_min.learner import Learner
from teamtr_min.run import checkpoint
from teamtr_min.tasks import Relay

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    run(out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip(file: Path, byte: int = -1000) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


# What a run reads back


def swap(agents: Path) -> None:
    (agents / "0").rename(agents / "x")
    (agents / "1").rename(agents / "0")
    (agents / "x").rename(agents / "1")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda agents: flip(agents / "1" / "model.safetensors"), "1/model.safetensors"),
        (lambda agents: flip(agents / "2" / "tokenizer.json"), "2/tokenizer.json"),
        (swap, "0/model.safetensors"),
        (lambda agents: (agents / "0" / "chat_template.jinja").write_text("x"), "0/chat_template.jinja"),
        (lambda agents: (agents / SUMS).unlink(), f"{SUMS} does not exist"),
    ],
)
def test_agents_that_are_not_those_of_the_run_are_not_evaluated(copy, capsys, spoil, words):
    spoil(copy / "agents")
    assert words in refusal(capsys, evaluation.main, "relay", "--team", str(copy))


def test_a_changed_digit_is_found_in_every_file_that_a_resume_reads(copy, capsys):
    shutil.rmtree(copy / "checkpoints" / "000002")

    def change(name: str, old: str, new: str) -> str:
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new, 1))
        sentence = refusal(capsys, train.main, "--resume", str(copy))
        (copy / name).write_text(text)
        return sentence

    for name, old, new in [
        ("config.json", '"inner_steps": 2', '"inner_steps": 3'),
        ("metrics.jsonl", '"steps": 2', '"steps": 1'),
        ("transcripts.jsonl", '"agent": 0', '"agent": 1'),
    ]:
        assert f"{name} is not as it was written" in change(name, old, new)
    assert "every checkpoint" in change("checkpoints/000001/state.json", '"seconds": ', '"seconds": 1')
    assert train.main(["--resume", str(copy)]) == 0


@pytest.mark.parametrize(
    "old, new",
    [('"pass_at": {"1": ', '"pass_at": {"1": 1'), ('"pass_at": {', '"pass_at": 1, "x": {'), ("{", "[")],
)
def test_a_kept_result_that_has_changed_is_measured_anew(copy, capsys, old, new):
    flags = ["relay", "--team", str(copy), "--problems", "8"]
    right, kept = evaluate(capsys, *flags), copy / "eval.jsonl"
    assert evaluate(capsys, *flags)["kept"]
    kept.write_text(kept.read_text().replace(old, new, 1))
    again = evaluate(capsys, *flags)
    assert "kept" not in again and again["pass_at"] == right["pass_at"]


def test_another_sealed_file_is_not_a_summary(copy, capsys):
    pytest.importorskip("matplotlib", reason="the figures of a report need matplotlib")
    shutil.copyfile(copy / "config.json", copy / "summary.json")
    sentence = refusal(capsys, evaluation.main, "report", "--team", str(copy))
    assert "summary.json is not the summary" in sentence


@pytest.mark.parametrize(
    "name, line, fault",
    [
        ("metrics.jsonl", "[1]", "not a line that a run writes"),
        ("metrics.jsonl", '{"kind": "update"}', "no accuracy"),
        ("metrics.jsonl", {"accuracy": "high"}, "accuracy cannot be that"),
        ("metrics.jsonl", {"stage": 1.5}, "stage cannot be that"),
        ("metrics.jsonl", {"stage": 10**12}, "stages beyond the 2"),
        ("metrics.jsonl", {"kl_after": [1]}, "kl_after cannot be that"),
        ("transcripts.jsonl", {"messages": [{"agent": 0}]}, "messages cannot be that"),
        ("transcripts.jsonl", {"text": 7}, "text cannot be that"),
        ("transcripts.jsonl", "{", "not a line that a run writes"),
    ],
)
def test_a_line_that_no_run_writes_is_named_by_the_report(copy, capsys, name, line, fault):
    pytest.importorskip("matplotlib", reason="the figures of a report need matplotlib")
    whole = (copy / name).read_text().split("\n")
    whole[1] = line if isinstance(line, str) else json.dumps(json.loads(whole[1]) | line)
    (copy / name).write_text("\n".join(whole))
    sentence = refusal(capsys, evaluation.main, "report", "--team", str(copy))
    assert fault in sentence and name in sentence and ("line 2" in sentence or "beyond" in sentence)


# Disks and outputs


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_a_disk_that_fills_up_leaves_advice_no_half_directory_and_a_run_that_resumes(
    finished, tmp_path, capsys, limit
):
    """Within a stage, when a line of the log no longer fits, and at its end, when the checkpoint does not."""
    out, old = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        sentence = refusal(capsys, train.main, *TOY, "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert f"continue with --resume {out}" in sentence
    left = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert left <= {"config.json", "metrics.jsonl", "transcripts.jsonl", "summary.json", "checkpoints"}
    assert train.main(["--resume", str(out)]) == 0
    assert same(weights(out), weights(finished))


@pytest.mark.parametrize("call", [1, 2])
def test_a_directory_that_was_moved_away_is_not_made_again(tmp_path, capsys, monkeypatch, call):
    out, moved, save, calls = tmp_path / "run", tmp_path / "moved", checkpoint.save, []

    def move_then_save(*arguments):
        calls.append(1)
        if len(calls) == call:
            out.rename(moved)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", move_then_save)
    assert "No such file" in refusal(capsys, train.main, *TOY, "--out", str(out))
    assert not out.exists()
    monkeypatch.undo()
    assert train.main(["--resume", str(moved)]) == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_outputs_are_no_error(tmp_path, closed):
    flags = [*TOY, "--stages", "1", "--agents", "1", "--out", str(tmp_path / "run")]
    command = f"exec '{sys.executable}' train.py {' '.join(flags)} {closed}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True).returncode == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_full_outputs_end_a_run_by_the_exit_code_alone(tmp_path):
    command = f"exec '{sys.executable}' train.py {' '.join(TOY)} --out '{tmp_path / 'run'}' > /dev/full 2>&1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists()


def test_a_reader_who_leaves_stops_the_run_and_it_resumes(tmp_path):
    command = f"'{sys.executable}' train.py {' '.join(TOY)} --out '{tmp_path / 'run'}' | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr
    if (tmp_path / "run").exists():  # it had measured something
        assert train.main(["--resume", str(tmp_path / "run")]) == 0


def test_saved_weights_are_as_readable_as_their_neighbours(finished):
    modes = {path.stat().st_mode for path in finished.rglob("*") if path.is_file()}
    assert len(modes) == 1


# NaN and infinity


def test_a_return_that_is_not_finite_stops_the_run_and_it_resumes(finished, tmp_path, capsys, monkeypatch):
    """Even one that a whole group has, which leaves no advantage."""
    grade, calls = Relay.grade, []

    def poisoned(*given):
        calls.append(1)
        return grade(*given) if len(calls) <= 8 else float("inf")

    monkeypatch.setattr(Relay, "grade", poisoned)
    assert train.main([*TOY, "--out", str(tmp_path / "run")]) == 1
    assert "NaN or infinity" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert same(weights(tmp_path / "run"), weights(finished))


def test_a_weight_that_is_not_finite_never_comes_into_a_checkpoint(tmp_path, capsys, monkeypatch):
    flags, step, steps = [*TOY, "--warm-start", "1", "--out"], Learner.step, []

    def poisoned(learner, lr):
        steps.append(1)
        if len(steps) == 3:
            learner.masters[0].data.view(-1)[0] = float("nan")
        return step(learner, lr)

    assert train.main([*flags, str(tmp_path / "right")]) == 0
    monkeypatch.setattr(Learner, "step", poisoned)
    assert train.main([*flags, str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "stopped: a weight is not finite\n"
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "right"))


# Models and tokenizers of strangers

WITHOUT_BOUNDS = [
    "{{ 'a' * 10**9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 10 ** (10**10) }}",
    "{{ 'ab' * 10**6 }}",
]


@pytest.mark.parametrize("text", WITHOUT_BOUNDS)
def test_a_template_ends_within_its_limits(tmp_path, text):
    write_tokenizer(tmp_path, text)
    sentence = refused(lambda: load_tokenizer(tmp_path).render([{"role": "user", "content": "x"}]))
    assert "chat template of" in sentence and len(sentence) < 600
    harmless = load_tokenizer(write_tokenizer(tmp_path / "other", "{{ messages[0].content }}"))
    assert harmless.render([{"role": "user", "content": "x"}]) == "x"


def test_a_normalizer_that_grows_without_bounds_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for steps, refuses in [(9, False), (30, True)]:
        raw["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * steps}
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        if refuses:
            assert "many times as long" in refused(load_tokenizer, tmp_path)
        else:
            assert len(load_tokenizer(tmp_path).encode("a")) == 2**steps


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"])
@pytest.mark.parametrize("what", [lambda p: p.symlink_to("nowhere"), os.mkfifo, Path.mkdir])
def test_what_cannot_be_read_is_not_absent(tmp_path, name, what):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    what(tmp_path / name)
    assert name in refused(load_tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("what", [os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_refused(tmp_path, name, what):
    write_checkpoint(tmp_path, random_model("qwen2"))
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    what(tmp_path / name)
    refused(load_tokenizer if name == "tokenizer.json" else load_model, tmp_path)


def test_pipes_in_a_run_are_refused(copy, tmp_path, capsys):
    fifo = tmp_path / "fifo.py"
    os.mkfifo(fifo)
    for flag in ("--task", "--router"):
        assert "pipe" in refusal(capsys, train.main, *TOY, flag, str(fifo))
    assert "pipe" in refusal(capsys, train.main, *TOY, "--task", "jsonl", "--data", str(fifo))
    (copy / "metrics.jsonl").unlink()
    os.mkfifo(copy / "metrics.jsonl")
    assert "pipe" in refusal(capsys, train.main, "--resume", str(copy))


@pytest.mark.parametrize("file", ["../other/x.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, file):
    write_checkpoint(tmp_path / "other", random_model("qwen2", seed=1))
    write_checkpoint(tmp_path / "model", random_model("qwen2"), shards=2)
    index = tmp_path / "model" / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"][next(iter(listing["weight_map"]))] = file
    index.write_text(json.dumps(listing))
    assert "not beside it" in refused(load_model, tmp_path / "model")


def test_shards_of_any_name_are_what_is_hashed(tmp_path):
    hashes = []
    for seed in (0, 1):
        directory = write_checkpoint(tmp_path / str(seed), random_model("qwen2", seed=seed), shards=2)
        for shard in directory.glob("model-*"):
            shard.rename(directory / shard.name.replace("model", "part"))
        index = directory / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-", "part-"))
        hashes.append(hash_weights(directory))
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("field", ["agents", "problems", "group", "stages", "max_new_tokens", "seed", "keep"])
@pytest.mark.parametrize("value", [10**23, 1e23])
def test_absurd_sizes_are_refused(field, value):
    with pytest.raises(UserError, match=field.replace("_", ".")):
        Config(**{field: value})


def test_a_message_quotes_a_line_at_most_and_nothing_that_a_terminal_obeys(tmp_path):
    write_checkpoint(tmp_path, random_model("qwen2"), config={"hidden_size": "\033[2J\n" * 10**6})
    sentence = refused(load_model, tmp_path)
    assert "hidden_size" in sentence and len(sentence) < 600 and sentence.isprintable()
    assert len(str(UserError("x" * 10**6))) <= 1000 and str(UserError("a\nb\033")) == "a b\\x1b"


def test_a_saved_model_has_the_mode_of_other_files(tmp_path):
    old = os.umask(0o027)
    try:
        save_model(random_model("qwen2"), tmp_path)
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o640"}
    assert torch.isfinite(load_model(tmp_path).head).all()
