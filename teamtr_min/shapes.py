"""What follows from a model's shape before it is there: parameters, and what a token leaves behind."""

from pathlib import Path
from typing import NamedTuple

from teamtr_min.model import ModelConfig


def layer_parameters(m: ModelConfig) -> int:
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    attention = 2 * m.hidden_size * (query + key)
    attention += (query + 2 * key) * m.qkv_bias + 2 * m.head_dim * m.qk_norm
    return attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size


def parameters(m: ModelConfig) -> int:
    outside = (2 - m.tied) * m.vocab_size * m.hidden_size + m.hidden_size
    return m.layers * layer_parameters(m) + outside


class AdapterSize(NamedTuple):
    """A LoRA adapter before it is loaded."""

    base: Path  # directory of its base
    rank: int
    targets: tuple[str, ...]

    def parameters(self, m: ModelConfig) -> int:
        query, key, hidden = m.heads * m.head_dim, m.kv_heads * m.head_dim, m.hidden_size
        ends = {name: hidden + m.intermediate_size for name in ("gate_proj", "up_proj", "down_proj")}
        ends |= {"q_proj": hidden + query, "o_proj": hidden + query}
        ends |= {"k_proj": hidden + key, "v_proj": hidden + key}
        return m.layers * self.rank * sum(ends[name] for name in self.targets)


def layer_numbers(m: ModelConfig) -> int:
    """Numbers that one token leaves in one layer for the way back.

    Six of hidden size (two residuals, their norms before and after the weight), queries before and after the
    rotation, attention's output and its copy, keys twice, values, and four in the MLP.
    """
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    return 6 * m.hidden_size + 4 * query + 3 * key + 4 * m.intermediate_size + 2 * (query + key) * m.qk_norm


def token_bytes(m: ModelConfig, width: int, checkpointing: bool) -> int:
    """Activations of one token of a training forward, with the gradients of the layer that is under way."""
    layer = layer_numbers(m) * width + (8 * m.hidden_size if width < 4 else 0)  # norms keep fp32 copies
    ends = 8 * m.hidden_size * 4  # below the first layer, above the last, and their gradients
    kept = m.layers * m.hidden_size * width + layer if checkpointing else m.layers * layer
    return kept + layer + ends
