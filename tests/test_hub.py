"""Models by name, against a hub on 127.0.0.1: what is fetched, how it goes on, what it says if it cannot."""

import collections
import errno
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import Hub, running
from huggingface_hub import constants, file_download
from tiny import assert_same, random_model, write_checkpoint, write_tokenizer

import eval as evaluation
import train
from teamtr_min import load_model, load_tokenizer
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.hf.weights import RELAY, find_model, pinned

ROOT = Path(__file__).parent.parent
NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json"}
TOY = ["--agents", "2", "--stages", "1", "--problems", "2", "--group", "2", "--inner-steps", "1",
       "--eval-problems", "8", "--max-new-tokens", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one's own and an empty cache; transfers in small pieces, and no patience between retries."""
    with running() as hub:
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        pause = file_download.time.sleep
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: pause(min(seconds, 0.01)))
        yield hub


def publish(hub: Hub, tmp_path: Path, shards: int = 1, seed: int = 0, name: str = "org/tiny"):
    """A repository with a random model, and beside it what nobody here reads; returns (model, commit)."""
    model = random_model("qwen2", seed=seed)
    directory = tmp_path / f"repo-{seed}-{shards}"
    write_tokenizer(write_checkpoint(directory, model, shards=shards))
    (directory / "original").mkdir()
    for unread in (
        "pytorch_model.bin",
        "README.md",
        "original/model.safetensors",
        "consolidated.safetensors",
    ):
        (directory / unread).write_bytes(b"never asked for")
    return model, hub.repo(name).commit(directory)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_only_what_is_read_is_fetched_and_only_once(hub, tmp_path, shards):
    model, commit = publish(hub, tmp_path, shards)
    assert_same(load_model("org/tiny"), model)
    weights = {f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)}
    weights |= {"model.safetensors.index.json"}
    assert hub.asked() == NEEDED | (weights if shards > 1 else {"model.safetensors"})
    assert_same(load_model("org/tiny"), model)
    assert load_tokenizer("org/tiny").encode("ab") and find_model("org/tiny").name == commit
    assert hub.requests == []


def test_the_weights_come_from_another_host_which_never_sees_the_token(hub, tmp_path):
    publish(hub, tmp_path)
    find_model("org/tiny")
    tokens = collections.defaultdict(set)
    for _, path, headers in hub.requests:
        tokens[path.startswith("/storage/")].add(headers.get("authorization"))
    assert tokens == {False: {"Bearer hf_secret"}, True: {None}}


@pytest.mark.parametrize("shards", [1, 2])
def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path, shards):
    model, _ = publish(hub, tmp_path, shards)
    hub.break_at = 5500
    assert "run the same command again" in refusal("org/tiny")
    hub.break_at = None
    hub.requests.clear()
    assert_same(load_model("org/tiny"), model)
    asked = [h.get("range") for method, path, h in hub.requests if "/storage/" in path and method == "GET"]
    assert asked == ["bytes=5000-", None][:shards]  # what had arrived in whole pieces is kept
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_what_arrived_damaged_is_fetched_anew(hub, tmp_path):
    model, _ = publish(hub, tmp_path)
    hub.break_at = 5500
    refusal("org/tiny")
    (part,) = (tmp_path / "home").rglob("*.incomplete")
    part.write_bytes(b"x" * 4000)
    hub.break_at = None
    assert "damaged" in refusal("org/tiny")
    assert_same(load_model("org/tiny"), model)
    find_model("org/tiny")


def test_a_snapshot_that_lacks_a_file_is_completed(hub, tmp_path):
    model, _ = publish(hub, tmp_path, shards=2)
    directory = find_model("org/tiny")
    for name in ("tokenizer.json", "model-00002-of-00002.safetensors"):
        (directory / name).resolve().unlink()  # leaves a link to nowhere
        hub.asked()
        assert_same(load_model("org/tiny"), model)
        assert hub.asked() == {name}


def test_a_name_with_a_revision_means_the_same_weights_for_ever(hub, tmp_path):
    old, first = publish(hub, tmp_path, seed=1)
    hub.repo("org/tiny").refs["v1"] = first
    config = pinned(Config(model="org/tiny, relay", agents=2))
    assert config.model == f"org/tiny@{first},relay"
    new, second = publish(hub, tmp_path, seed=2)
    assert hub.repo("org/tiny").refs["main"] == second != first
    for empty in (False, True):
        if empty:
            os.environ["HF_HOME"] += "-elsewhere"
        for name in (config.models[0], "org/tiny@v1"):
            assert_same(load_model(name), old)
    assert_same(load_model("org/tiny"), new)  # this cache has not seen main before
    assert_same(load_model(f"org/tiny@{second}"), new)
    for name in ("relay", str(RELAY)):
        assert pinned(Config(model=name)).model == name


def test_a_branch_that_did_not_arrive_is_not_taken_for_one_that_did(hub, tmp_path):
    old, _ = publish(hub, tmp_path, seed=1)
    find_model("org/tiny")
    new, second = publish(hub, tmp_path, seed=2)
    hub.break_at = 5500
    refusal(f"org/tiny@{second}")
    assert_same(load_model("org/tiny"), old)


@pytest.mark.parametrize("status, code", [(401, "GatedRepo"), (403, "GatedRepo"), (403, "")])
def test_a_gated_model_says_where_to_accept_its_licence(hub, tmp_path, status, code):
    publish(hub, tmp_path)
    hub.repo("org/tiny").gated = status, {"X-Error-Code": code}
    sentence = refusal("org/tiny")
    assert f"accept its licence on {hub.url}/org/tiny" in sentence and "HF_TOKEN" in sentence
    assert not any("/storage/" in path for _, path, _ in hub.requests)


def test_what_the_hub_does_not_have_is_named(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path)
    assert "shows you no model org/nothing: check the name" in refusal("org/nothing")
    assert "org/tiny has no revision v9" in refusal("org/tiny@v9")
    assert f"org/tiny has no revision {'0' * 40}" in refusal(f"org/tiny@{'0' * 40}")
    assert "neither a directory nor the id" in refusal("o rg/ti*ny")
    for lacking, words in {"model.safetensors": "weights in safetensors", "config.json": "config.json",
                           "tokenizer.json": "tokenizer.json"}.items():  # fmt: skip
        files = dict(hub.repo("org/tiny").commits[hub.repo("org/tiny").refs["main"]])
        del files[lacking]
        hub.repo("org/less").commit(files)
        hub.requests.clear()
        assert f"org/less at main has no {words}" in refusal("org/less")
        assert hub.asked() == set()
    monkeypatch.setattr(hub, "find", lambda name, revision: (401, ""))  # to strangers, of private ones too
    assert "shows you no model org/nothing: check the name" in refusal("org/nothing")
    monkeypatch.setattr(hub, "find", lambda name, revision: (503, ""))
    assert f"{hub.url} answered 503" in refusal("org/nothing")


def test_a_token_that_is_refused_is_among_the_things_to_check(hub, tmp_path):
    publish(hub, tmp_path)
    hub.token = "hf_another"
    assert "or the token old" in refusal("org/tiny")


def test_two_runs_that_start_together_fetch_the_weights_once(hub, tmp_path):
    publish(hub, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(find_model, ["org/tiny"] * 4))) == 1
    assert sum(path.startswith("/storage/") for _, path, _ in hub.requests) == 1


def test_a_model_of_another_architecture_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    publish(hub, tmp_path)
    files = hub.repo("org/tiny").commits[hub.repo("org/tiny").refs["main"]]
    other = json.loads(files["config.json"]) | {"architectures": ["MistralForCausalLM"]}
    hub.repo("org/other").commit({**files, "config.json": json.dumps(other).encode()})
    assert "MistralForCausalLM is not supported" in refusal("org/other")
    assert "model.safetensors" not in hub.asked()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's own, for a small file
def test_a_disk_without_room_is_said_before_the_weights_are_fetched(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "make room, or set HF_HOME" in refusal("org/tiny")
    assert "model.safetensors" not in hub.asked()


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert f"no space is left in {tmp_path / 'home' / 'hub'}: make room" in refusal("org/tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert f"cannot write to {tmp_path / 'file' / 'hub'} (Not a directory)" in refusal("org/tiny")


def test_without_a_connection_it_is_said_at_once_and_the_cache_still_serves(hub, tmp_path, monkeypatch):
    model, _ = publish(hub, tmp_path)
    find_model("org/tiny")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same(load_model("org/tiny"), model)
    assert "HF_HUB_OFFLINE is set" in refusal("org/other") and hub.requests == []
    (find_model("org/tiny") / "tokenizer.json").unlink()
    assert "is not complete (tokenizer.json)" in refusal("org/tiny")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    begin = time.perf_counter()
    for name in ("org/other", "org/tiny"):
        sentence = refusal(name)
        assert "cannot be reached (" in sentence and "Connection refused" in sentence
        assert f"hf download {name} " in sentence
    assert time.perf_counter() - begin < 5


def test_a_run_names_its_commit_and_resumes_with_the_flags_it_was_started_with(hub, tmp_path, capsys):
    """The command in a process of its own; afterwards the model's branch moves and the cache is gone."""
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    pin = f"{name}@{hub.repo(name).commit(RELAY)}"
    out, flags = str(tmp_path / "run"), [*TOY, "--model", "qwen2.5-0.5b"]
    command = [sys.executable, "train.py", *flags, "--out", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert pin in result.stdout and Config.load(tmp_path / "run" / "config.json").model == pin
    trained = load_model(tmp_path / "run" / "agents" / "0")

    hub.repo(name).commit({"config.json": b"{}"})
    os.environ["HF_HOME"] += "-elsewhere"
    hub.requests.clear()
    assert train.main(["--resume", out, "--model", "qwen3-0.6b"]) == 2
    assert f"the run has {pin}" in capsys.readouterr().err and hub.requests == []
    assert train.main(["--resume", out, *flags]) == 0
    assert hub.asked() == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert_same(load_model(tmp_path / "run" / "agents" / "0"), trained)
    capsys.readouterr()
    for team in (["--team", out], ["--model", pin, *TOY[:2]]):
        assert evaluation.main(["relay", "--json", *team, "--problems", "8", "--device", "cpu"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model"] == pin and result["problems"] == 8 and hub.requests == []
