"""The shipped models, and the program that makes them."""

import pytest

from teamtr_min.studies import pretrain


@pytest.mark.parametrize("task", pretrain.COURSES)
def test_pretraining_is_reproducible(tmp_path, task):
    for name in ("a", "b"):
        pretrain.main(["--task", task, "--out", str(tmp_path / name), "--steps", "3"])
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["relay", "convention"])
def test_a_shipped_model_is_small_and_its_tokenizer_is_what_pretrain_writes(name, tmp_path):
    pretrain.write_tokenizer(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (pretrain.ASSETS / name / file).read_bytes()
    assert sum(p.stat().st_size for p in (pretrain.ASSETS / name).iterdir()) < 1e6
