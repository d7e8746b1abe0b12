"""The program that makes the shipped models."""

import pytest

from teamtr_min.studies import pretrain


@pytest.mark.parametrize("task", pretrain.COURSES)
def test_pretraining_is_reproducible(tmp_path, task):
    for name in ("a", "b"):
        pretrain.main(["--task", task, "--out", str(tmp_path / name), "--steps", "3"])
    for file in ("model.safetensors", "config.json", *pretrain.TOKENIZER):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
