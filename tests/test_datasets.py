"""Data sets by name, against a server on 127.0.0.1: what is fetched, kept and refused."""

import errno
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import refusal, shared

import eval as evaluation
import train
from teamtr_min.config import Config
from teamtr_min.tasks import TASKS, datasets, load_task
from teamtr_min.tasks.datasets import DATASETS, SHA256, URLS, local_copy

TOY = ["--agents", "2", "--max-new-tokens", "4", "--device", "cpu"]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        server.requests.append(name)
        content = server.files.get(name)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: server.break_at])

    def log_message(self, *args):
        pass


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A server that has the files of its `files`, to which all URLs point, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.break_at = {}, [], None
    server.cache = tmp_path / "cache"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("TEAMTR_CACHE", str(server.cache))
    for name in URLS:
        monkeypatch.setitem(URLS, name, f"http://127.0.0.1:{server.server_port}/{name}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def publish(publisher, monkeypatch):
    """Publishes problems under a name, with the hash that makes them the right ones."""

    def put(name: str, texts: list[str], field: str = "problem"):
        lines = [json.dumps({field: text, "answer": 7}) + "\n" for text in texts]
        publisher.files[name] = "".join(lines).encode()
        monkeypatch.setitem(SHA256, name, hashlib.sha256(publisher.files[name]).hexdigest())

    return put


def kept(server) -> list[str]:
    """What lies in the cache, without the locks."""
    return sorted(path.name for path in server.cache.iterdir() if path.suffix != ".lock")


def test_every_name_is_a_task_and_a_benchmark_and_every_file_is_pinned():
    files = {file for *names, _ in DATASETS.values() for file in names if file}
    assert set(URLS) == set(SHA256) == files
    assert set(DATASETS) < set(TASKS) and set(DATASETS) < set(evaluation.BENCHMARKS)
    assert all(url.startswith("https://") for url in URLS.values())
    assert len({*SHA256.values()}) == len(files) and all(len(value) == 64 for value in SHA256.values())


def test_the_published_gsm8k_is_fetched_once_and_then_read_offline(publisher):
    for side in ("train", "test"):
        publisher.files[f"gsm8k-{side}"] = shared(f"gsm8k/{side}.jsonl").read_bytes()
    for _ in range(2):
        task = load_task(Config(task="gsm8k"), training=True)
        assert (len(task.train), len(task.held_out)) == (7473, 1319)
    assert sorted(publisher.requests) == ["gsm8k-test", "gsm8k-train"]
    assert kept(publisher) == ["gsm8k-test.jsonl", "gsm8k-train.jsonl"]


def test_math_is_trained_on_apart_from_math500(publish, publisher):
    publish("math-train", ["a", "b", "c"])
    publish("math500", ["b", "d"])
    task = load_task(Config(task="math"), training=True)
    assert [p.text for p in task.train] == ["a", "c"] and [p.text for p in task.held_out] == ["b", "d"]
    assert load_task(Config(task="math500")).held_out == task.held_out
    assert publisher.requests == ["math500", "math-train"]


def test_runs_that_start_together_fetch_once(publish, publisher):
    publish("aime25", ["a"] * 1000)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(local_copy, ["aime25"] * 8))
    assert publisher.requests == ["aime25"] and paths == {publisher.cache / "aime25.jsonl"}


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(publish, publisher):
    publish("amc23", ["a"])
    local_copy("amc23").write_text("{}")
    assert local_copy("amc23").read_bytes() == publisher.files["amc23"] and len(publisher.requests) == 2


def test_a_download_that_breaks_off_leaves_nothing(publish, publisher):
    publish("math500", ["a"] * 9000)
    publisher.break_at = 100_000
    assert "the connection broke off after 100,000 bytes" in refusal(local_copy, "math500")
    assert kept(publisher) == []
    publisher.break_at = None
    assert local_copy("math500").read_bytes() == publisher.files["math500"]


def test_another_file_is_refused(publish, publisher, monkeypatch):
    publish("math500", ["a"])
    publisher.files["math500"] += b" "
    assert "its sha256 is another" in refusal(local_copy, "math500")
    monkeypatch.setattr(datasets, "LIMIT", 1 << 20)
    publisher.files["math500"] = bytes(3 << 20)
    assert "larger than 1 MB" in refusal(local_copy, "math500")
    assert kept(publisher) == []


def test_what_cannot_be_had_is_a_sentence_with_its_address_and_a_way_out(publisher, capsys, monkeypatch):
    said = [refusal(local_copy, "aime24")]
    assert "(HTTP Error 404: Not Found)" in said[0]
    monkeypatch.setitem(URLS, "aime24", "http://127.0.0.1:9/aime24")  # nobody listens there
    said.append(refusal(local_copy, "aime24"))
    assert "Connection refused" in said[1]
    for sentence in said:
        assert URLS["aime24"].rpartition("/")[2] in sentence and "--data" in sentence
    assert evaluation.main(["aime24", *TOY]) == 2
    error = capsys.readouterr().err
    assert URLS["aime24"] in error and error.count("\n") == 1


def test_a_full_disk_is_a_sentence(publish, publisher, monkeypatch):
    publish("amc23", ["a"])

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "replacing", full)
        said = refusal(local_copy, "amc23")
    assert "No space left on device" in said and URLS["amc23"] in said
    assert "TEAMTR_CACHE" in said and "--data" in said and kept(publisher) == []


def test_test_sets_are_not_trained_on(publisher, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("math500", "aime24", "aime25", "amc23"):
        assert train.main(["--task", name]) == 2
        error = capsys.readouterr().err
        assert f"{name} is there to evaluate on: train on math" in error and error.count("\n") == 1
    assert not publisher.requests and not (tmp_path / "runs").exists()


def test_a_team_of_one_data_set_is_evaluated_on_another(publish, publisher, capsys, tmp_path, monkeypatch):
    model = str(shared("stories260K/hf_qwen2"))
    monkeypatch.chdir(tmp_path)
    publish("gsm8k-train", ["1 + 1?", "1 + 2?"], "question")
    publish("gsm8k-test", ["1 + 3?"], "question")
    publish("math500", [f"{i} + {i}?" for i in range(5)])
    short = ["--stages", "1", "--problems", "2", "--group", "2", "--inner-steps", "1"]
    assert train.main([*TOY, *short, "--model", model, "--task", "gsm8k", "--out", "runs/a"]) == 0
    capsys.readouterr()
    results = []
    for flags in (["--team", "runs/a"], ["--model", model, *TOY]):
        assert evaluation.main(["math500", "--json", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [(r["benchmark"], r["problems"], r["team"]) for r in results] == [
        ("math500", 5, "runs/a"), ("math500", 5, "untrained team")
    ]  # fmt: skip
    copy = ["--data", str(publisher.cache / "math500.jsonl"), "--question-field", "problem"]
    assert evaluation.main(["math500", "--json", "--team", "runs/a", *copy]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 5
    assert sorted(publisher.requests) == ["gsm8k-test", "gsm8k-train", "math500"]
