"""A model whose vocabulary was cut short is one with another tokenizer, and otherwise itself."""

import pytest
import torch
from commands import refusal
from tiny import shared

from teamtr_min import load_model, load_tokenizer
from teamtr_min.studies.cut_vocabulary import cut_tokenizer, main


@torch.no_grad()
def test_text_survives_in_shorter_pieces_and_logits_are_those_of_the_kept_rows(tmp_path):
    whole = shared("stories260K/hf_llama")
    assert main([str(whole), str(tmp_path), "--size", "490"]) == 0
    (before, old), (after, new) = ((load_tokenizer(d), load_model(d)) for d in (whole, tmp_path))
    text = "Once upon a time, Lily found 12 shells."
    ids = after.encode(text)
    assert after.decode(ids) == text and max(ids) < 490 and len(ids) >= len(before.encode(text))
    tokens = torch.tensor([ids])
    torch.testing.assert_close(new(tokens), old(tokens)[..., :490], atol=1e-5, rtol=0)
    assert new.config.vocab_size == 490 and len(new.head) == 490


def test_merges_stay_where_both_parts_and_the_whole_do():
    vocab = {text: i for i, text in enumerate(["<s>", *"abcdef", "ab", "cd", "abcd", "ef", "abcdef"])}
    merges = ["a b", "c d", "ab cd", "e f", "abcd ef"]
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": [{"id": 0}]}
    cut = cut_tokenizer(tokenizer, 10)["model"]
    assert cut["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]] and len(cut["vocab"]) == 10


@pytest.mark.parametrize("size, reason", [("2", "special tokens"), ("513", "no 513 tokens in a row")])
def test_what_cannot_be_cut_is_a_sentence(tmp_path, capsys, size, reason):
    whole = str(shared("stories260K/hf_llama"))
    assert reason in refusal(capsys, main, whole, str(tmp_path / "out"), "--size", size)
    assert not (tmp_path / "out").exists()
