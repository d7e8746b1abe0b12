"""Models by name from the Hugging Face hub: what is fetched and when, and the sentence if it cannot be."""

import fnmatch
import shutil
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors
from tiny import assert_same, random_model, refusal, write_checkpoint, write_tokenizer

from teamtr_min import load_model, load_tokenizer
from teamtr_min.config import Config
from teamtr_min.hf.hub import ALIASES, snapshot
from teamtr_min.hf.weights import find_model, pinned

COMMIT = "c" * 40


class Hub:
    """Stands for snapshot_download: copies files of `directory` to a cache, and remembers the requests."""

    def __init__(self, directory: Path, cache: Path):
        self.directory, self.cache, self.asked, self.fails = directory, cache / "snapshots" / COMMIT, [], None

    def __call__(self, repo, revision, allow_patterns):
        self.asked.append((repo, revision))
        if self.fails:
            raise self.fails
        self.cache.mkdir(parents=True, exist_ok=True)
        for file in self.directory.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.cache / file.name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "repo").mkdir()
    hub = Hub(tmp_path / "repo", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    snapshot.cache_clear()
    yield hub
    snapshot.cache_clear()


@pytest.mark.parametrize("shards", [1, 3])
def test_only_what_is_read_is_fetched_and_asked_for_once(hub, shards):
    model = random_model("qwen2")
    write_tokenizer(write_checkpoint(hub.directory, model, shards=shards))
    wanted = {file.name for file in hub.directory.iterdir()}
    for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors"):
        (hub.directory / name).write_bytes(b"never read")
    assert_same(load_model("org/tiny@v2"), model)
    assert load_tokenizer("org/tiny@v2").encode("ab") and find_model("org/tiny@v2").name == COMMIT
    assert {file.name for file in hub.cache.iterdir()} == wanted
    assert hub.asked == [("org/tiny", "v2"), ("org/tiny", COMMIT)]


def test_an_alias_is_a_hub_id_in_capitals_or_not_with_a_revision_or_without(hub):
    write_tokenizer(write_checkpoint(hub.directory, random_model("qwen2")))
    for name, revision in (("qwen2.5-1.5b", "main"), ("Qwen2.5-1.5B@v2", "v2")):
        find_model(name)
        assert hub.asked[-2] == ("Qwen/Qwen2.5-1.5B-Instruct", revision)
    assert all(alias == alias.lower() and ALIASES[alias].count("/") == 1 for alias in ALIASES)
    config = pinned(Config(model="qwen3-0.6b,relay", agents=2, task="relay"))
    assert config.models == [f"Qwen/Qwen3-0.6B@{COMMIT}", "relay"]


def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_fetched(hub):
    write_tokenizer(write_checkpoint(hub.directory, random_model("qwen2"), config={"mlp_bias": True}))
    assert "mlp_bias is not supported" in refusal(find_model, "org/tiny")
    assert not list(hub.cache.glob("*.safetensors"))


@pytest.mark.parametrize("error", [
    errors.GatedRepoError("403, restricted", response=Mock(headers={})), OSError(28, "No space left"),
    errors.LocalEntryNotFoundError("traffic has been disabled"), errors.HTTPError("connection broke off"),
])  # fmt: skip
def test_a_failure_is_one_sentence_with_the_model_the_reason_and_ways_out(hub, error):
    hub.fails = error
    sentence = refusal(find_model, "org/tiny")
    assert sentence.startswith("org/tiny@main cannot be had from the Hugging Face hub: ")
    assert str(error) in sentence and "hf auth login" in sentence and "--local-dir" in sentence


def test_what_is_no_id_of_a_model_is_refused_before_anything_is_asked(hub):
    for name in ("qwen9", "a/b/c", "/nowhere/at/all", "~/nothing"):
        assert "no model" in refusal(find_model, name)
    assert not hub.asked
