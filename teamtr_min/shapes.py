"""What follows from a model's shape before it is there: parameters, and what a token leaves behind."""

from teamtr_min.model import ModelConfig


def parameters(m: ModelConfig) -> int:
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    attention = 2 * m.hidden_size * (query + key)
    attention += (query + 2 * key) * m.qkv_bias + 2 * m.head_dim * m.qk_norm
    layer = attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    return m.layers * layer + (2 - m.tied) * m.vocab_size * m.hidden_size + m.hidden_size


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
