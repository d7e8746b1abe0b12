"""Frozen weights of 16 bits are read as fp16 by a CPU that samples, and nothing else changes."""

import pytest
import torch
from tiny import CONFIGS, adapted, random_model, random_tokens

from teamtr_min.engine import half
from teamtr_min.engine.sampler import generate
from teamtr_min.hf.lora import LoraLinear

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no FBGEMM here"
)


def of_16_bits(family: str, tied: bool = False):
    """A frozen model whose weights are bf16 numbers."""
    return random_model(family, tied).to(torch.bfloat16).float().requires_grad_(False)


def packed(model) -> list[bool]:
    with torch.inference_mode():
        return [half.in_fp16(p) is not None for p in model.parameters() if p.dim() == 2]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [False, True])
def test_sampling_by_fp16_weights_has_the_log_probs_of_the_plain_model(family, lora):
    model = of_16_bits(family)
    model = adapted(model, rank=2) if lora else model
    prompts = random_tokens(model, 5, 7).tolist()
    found = generate(model, prompts, 9)
    assert any(packed(model))
    exact = model.double()
    for prompt, completion in zip(prompts, found):
        tokens = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            want = exact.logits(exact.hidden(tokens)).log_softmax(-1)[0, len(prompt) - 1 : -1]
        want = want.gather(-1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), want, atol=2e-5, rtol=0, check_dtype=False
        )


def test_weights_that_are_trained_or_that_fp16_would_round_are_read_as_they_are():
    trained, wide = of_16_bits("qwen2").requires_grad_(), random_model("qwen2").requires_grad_(False)
    lora = adapted(of_16_bits("qwen2"), rank=2)
    for model in (trained, wide, lora):
        generate(model, [[1, 2]], 2)
    assert not any(packed(trained) + packed(wide))
    layers = [m for m in lora.modules() if isinstance(m, LoraLinear)]
    with torch.inference_mode():
        assert all(half.in_fp16(m.weight) is not None and half.in_fp16(m.lora_A) is None for m in layers)


def test_a_weight_that_has_changed_is_never_read_as_it_was():
    model, prompts = of_16_bits("llama"), [[3, 1, 4]]
    generate(model, prompts, 4)
    other = random_model("llama", seed=1, tied=False).to(torch.bfloat16).float().requires_grad_(False)
    model.load_state_dict(other.state_dict())
    assert not any(packed(model))  # until the next collection begins
    assert generate(model, prompts, 4) == generate(other, prompts, 4) and any(packed(model))
    for p in model.parameters():
        p.data = p.data.double()
    assert not any(packed(model)) and len(generate(model, prompts, 4)) == 1


def test_what_is_not_sampled_has_the_bits_of_an_unpacked_model():
    model, tokens = of_16_bits("qwen3"), random_tokens(random_model("qwen3"), 2, 11)
    with torch.no_grad():
        before = model(tokens)
        generate(model, [[1, 2]], 2)
        assert any(packed(model)) and all(half.in_fp16(p) is None for p in model.parameters())
        assert torch.equal(model(tokens), before)
