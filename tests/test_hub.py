"""Models by name, against a hub on 127.0.0.1: what is fetched, how it goes on, what it says if it cannot."""

import collections
import errno
import importlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import Hub, read_files, running
from huggingface_hub import constants, file_download
from tiny import assert_same, random_model, refusal, write_checkpoint, write_tokenizer

import eval as evaluation
import train
from teamtr_min import load_model, load_tokenizer
from teamtr_min.config import Config
from teamtr_min.hf.hub import ALIASES
from teamtr_min.hf.weights import RELAY, find_model, pinned

ROOT = Path(__file__).parent.parent
NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json"}
TOY = ["--agents", "2", "--stages", "1", "--problems", "2", "--group", "2", "--inner-steps", "1",
       "--eval-problems", "8", "--max-new-tokens", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def environ(monkeypatch):
    """Sets variables of the environment, which huggingface_hub then reads as when a process starts."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        importlib.reload(constants)
        constants.DOWNLOAD_CHUNK_SIZE = 1000

    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield change
    monkeypatch.undo()
    importlib.reload(constants)


@pytest.fixture
def hub(tmp_path, environ, monkeypatch):
    """A hub of one's own and an empty cache; transfers in small pieces, and no patience between retries."""
    with running() as hub:
        environ(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_secret")
        pause = file_download.time.sleep
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: pause(min(seconds, 0.01)))
        yield hub


def publish(hub: Hub, tmp_path: Path, shards: int = 1, seed: int = 0):
    """org/tiny with a random model, and beside it what nobody here reads; returns (model, commit)."""
    model = random_model("qwen2", seed=seed)
    directory = write_tokenizer(write_checkpoint(tmp_path / f"repo-{seed}", model, shards=shards))
    unread = ("pytorch_model.bin", "README.md", "original/model.safetensors", "consolidated.safetensors")
    files = read_files(directory) | dict.fromkeys(unread, b"never asked for")
    return model, hub.repo("org/tiny").commit(files)


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


def test_an_alias_is_a_hub_id_in_capitals_or_not_with_a_revision_or_without(hub):
    commit = hub.repo("Qwen/Qwen2.5-1.5B-Instruct").commit(read_files(RELAY))
    for name in ("qwen2.5-1.5b", "Qwen2.5-1.5B@main", f"qwen2.5-1.5b@{commit}", "Qwen/Qwen2.5-1.5B-Instruct"):
        assert find_model(name).name == commit
    assert "no model Qwen/Qwen3-0.6B:" in refusal(find_model, "qwen3-0.6b")
    assert all(alias == alias.lower() and ALIASES[alias].count("/") == 1 for alias in ALIASES)


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
    assert "run the same command again" in refusal(load_model, "org/tiny")
    hub.break_at = None
    hub.requests.clear()
    assert_same(load_model("org/tiny"), model)
    asked = [h.get("range") for method, path, h in hub.requests if "/storage/" in path and method == "GET"]
    assert asked == ["bytes=5000-", None][:shards]  # what had arrived in whole pieces is kept
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_what_arrived_damaged_is_fetched_anew(hub, tmp_path):
    model, _ = publish(hub, tmp_path)
    hub.break_at = 5500
    refusal(load_model, "org/tiny")
    (part,) = (tmp_path / "home").rglob("*.incomplete")
    part.write_bytes(b"x" * 4000)
    hub.break_at = None
    assert "damaged" in refusal(load_model, "org/tiny")
    assert_same(load_model("org/tiny"), model)


def test_a_snapshot_that_lacks_a_file_is_completed(hub, tmp_path):
    model, _ = publish(hub, tmp_path, shards=2)
    directory = find_model("org/tiny")
    for name in ("tokenizer.json", "model-00002-of-00002.safetensors"):
        (directory / name).resolve().unlink()  # leaves a link to nowhere
        hub.asked()
        assert_same(load_model("org/tiny"), model)
        assert hub.asked() == {name}


def test_a_name_with_a_revision_means_the_same_weights_for_ever(hub, environ, tmp_path):
    old, first = publish(hub, tmp_path, seed=1)
    hub.repo("org/tiny").refs["v1"] = first
    config = pinned(Config(model="org/tiny, relay", agents=2))
    assert config.model == f"org/tiny@{first},relay"
    new, second = publish(hub, tmp_path, seed=2)
    for home in ("home", "elsewhere"):
        environ(HF_HOME=str(tmp_path / home))
        for name in (config.models[0], "org/tiny@v1"):
            assert_same(load_model(name), old)
    assert_same(load_model("org/tiny"), new)  # this cache has not seen main before
    assert_same(load_model(f"org/tiny@{second}"), new)
    for name in ("relay", str(RELAY)):
        assert pinned(Config(model=name)).model == name


def test_a_branch_that_did_not_arrive_is_not_taken_for_one_that_did(hub, tmp_path):
    old, _ = publish(hub, tmp_path, seed=1)
    find_model("org/tiny")
    _, second = publish(hub, tmp_path, seed=2)
    hub.break_at = 5500
    refusal(load_model, f"org/tiny@{second}")
    assert_same(load_model("org/tiny"), old)


@pytest.mark.parametrize("status, code", [(401, "GatedRepo"), (403, "GatedRepo"), (403, "")])
def test_a_gated_model_says_where_to_accept_its_licence(hub, tmp_path, status, code):
    publish(hub, tmp_path)
    hub.repo("org/tiny").gated = status, code
    sentence = refusal(load_model, "org/tiny")
    assert f"accept its licence on {hub.url}/org/tiny" in sentence and "HF_TOKEN" in sentence
    assert not any("/storage/" in path for _, path, _ in hub.requests)


def test_a_name_that_the_hub_does_not_know_is_named(hub, tmp_path):
    publish(hub, tmp_path)
    assert "shows you no model org/nothing: check the name" in refusal(load_model, "org/nothing")
    for revision in ("v9", "0" * 40):
        assert f"org/tiny has no revision {revision}:" in refusal(load_model, f"org/tiny@{revision}")
    assert "neither a directory nor the id" in refusal(load_model, "o rg/ti*ny")


@pytest.mark.parametrize("lacking", ["weights in safetensors", "config.json", "tokenizer.json"])
def test_a_repository_without_what_is_needed_is_refused_before_anything_is_fetched(hub, tmp_path, lacking):
    publish(hub, tmp_path)
    files = dict(hub.repo("org/tiny").main)
    del files["model.safetensors" if "weights" in lacking else lacking]
    hub.repo("org/less").commit(files)
    assert f"org/less at main has no {lacking}" in refusal(load_model, "org/less")
    assert hub.asked() == set()


def test_what_the_hub_answers_instead_is_told(hub):
    hub.status = 401  # to strangers, for private models and for none
    assert "shows you no model org/nothing: check the name" in refusal(load_model, "org/nothing")
    hub.status = 503
    assert f"{hub.url} answered 503" in refusal(load_model, "org/nothing")
    hub.status, hub.token = None, "hf_another"
    assert "or the token old" in refusal(load_model, "org/nothing")
    hub.status = 200  # of a proxy that asks for a login, say: not JSON
    assert "does not answer as the hub does" in refusal(load_model, "org/nothing")


def test_two_runs_that_start_together_fetch_the_weights_once(hub, tmp_path):
    publish(hub, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(find_model, ["org/tiny"] * 4))) == 1
    assert sum(path.startswith("/storage/") for _, path, _ in hub.requests) == 1


def test_a_model_of_another_architecture_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    publish(hub, tmp_path)
    files = hub.repo("org/tiny").main
    other = json.loads(files["config.json"]) | {"architectures": ["MistralForCausalLM"]}
    hub.repo("org/other").commit(files | {"config.json": json.dumps(other).encode()})
    assert "MistralForCausalLM is not supported" in refusal(load_model, "org/other")
    assert "model.safetensors" not in hub.asked()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's own, for a small file
def test_a_disk_without_room_is_said_before_the_weights_are_fetched(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "make room, or set HF_HOME" in refusal(load_model, "org/tiny")
    assert "model.safetensors" not in hub.asked()


def test_a_cache_that_cannot_be_written_is_named(hub, environ, tmp_path, monkeypatch):
    publish(hub, tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert f"no space is left in {tmp_path / 'home' / 'hub'}: make room" in refusal(load_model, "org/tiny")
    (tmp_path / "file").write_text("")
    environ(HF_HUB_CACHE=str(tmp_path / "file"))
    assert f"cannot write to {tmp_path / 'file'} (Not a directory)" in refusal(load_model, "org/tiny")


def test_without_a_connection_it_is_said_at_once_and_the_cache_still_serves(hub, environ, tmp_path):
    model, _ = publish(hub, tmp_path)
    find_model("org/tiny")
    hub.requests.clear()
    environ(HF_HUB_OFFLINE="1")
    assert_same(load_model("org/tiny"), model)
    assert "HF_HUB_OFFLINE is set" in refusal(load_model, "org/other") and hub.requests == []
    (find_model("org/tiny") / "tokenizer.json").unlink()
    assert "is not complete (tokenizer.json)" in refusal(load_model, "org/tiny")
    environ(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    begin = time.perf_counter()
    for name, revision in (("org/other", "v1"), ("org/tiny", "main")):
        sentence = refusal(load_model, f"{name}@{revision}")
        assert f"{name} at {revision} is not " in sentence and f"hf download {name} " in sentence
        assert "cannot be reached (" in sentence and "Connection refused" in sentence
    assert time.perf_counter() - begin < 5


def test_a_run_names_its_commit_and_resumes_with_the_flags_it_was_started_with(
    hub, environ, tmp_path, capsys
):
    """The command in a process of its own; afterwards the model's branch moves and the cache is gone."""
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    pin = f"{name}@{hub.repo(name).commit(read_files(RELAY))}"
    out, flags = str(tmp_path / "run"), [*TOY, "--task", "relay", "--model", "qwen2.5-0.5b"]
    command = [sys.executable, "train.py", *flags, "--out", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert pin in result.stdout and Config.load(tmp_path / "run" / "config.json").model == pin
    trained = load_model(tmp_path / "run" / "agents" / "0")

    hub.repo(name).commit({"config.json": b"{}"})
    environ(HF_HOME=str(tmp_path / "elsewhere"))
    hub.requests.clear()
    assert train.main(["--resume", out, "--model", "qwen3-0.6b"]) == 2
    assert f"the run has {pin}" in capsys.readouterr().err and hub.requests == []
    assert train.main(["--resume", out, *flags]) == 0
    assert hub.asked() == NEEDED | {"model.safetensors"}
    assert_same(load_model(tmp_path / "run" / "agents" / "0"), trained)
    capsys.readouterr()
    for team in (["--team", out], ["--model", pin, *TOY[:2]]):
        assert evaluation.main(["relay", "--json", *team, "--problems", "8", "--device", "cpu"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["model"] == pin and result["problems"] == 8 and hub.requests == []
