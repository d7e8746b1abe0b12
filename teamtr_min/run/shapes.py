"""What follows from a model's shape before it is there: parameters, and what a token leaves behind."""

from teamtr_min.engine.model import ModelConfig


def layer_parameters(m: ModelConfig) -> int:
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    attention = 2 * m.hidden_size * (query + key)
    attention += (query + 2 * key) * m.qkv_bias + 2 * m.head_dim * m.qk_norm
    return attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size


def parameters(m: ModelConfig) -> int:
    outside = (2 - m.tied) * m.vocab_size * m.hidden_size + m.hidden_size
    return m.layers * layer_parameters(m) + outside


def layer_numbers(m: ModelConfig) -> int:
    """Numbers that one token leaves in one layer for the way back (kernels/layer.py says why so few).

    Four of hidden size (two residuals and their norms), queries after the rotation, attention's output and
    its copy, keys and values, what norms of heads were given, gate and up.
    """
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    return 4 * m.hidden_size + 3 * query + 2 * key + 2 * m.intermediate_size + (query + key) * m.qk_norm


def layer_work(m: ModelConfig) -> int:
    """Numbers of one token that come and go while a layer is under way, forward or back, at most."""
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    return 4 * m.hidden_size + max(4 * m.intermediate_size, 4 * (query + key))


def token_bytes(m: ModelConfig, width: int, checkpointing: bool, lora: bool = False) -> int:
    """Activations of one token of a training forward, with the gradients of the layer that is under way."""
    layer = (layer_numbers(m) + m.intermediate_size * lora) * width  # an adapter's A keeps what it reads
    ends = 8 * m.hidden_size * 4  # below the first layer, above the last, and their gradients
    kept = m.layers * m.hidden_size * width + layer if checkpointing else m.layers * layer
    return kept + layer_work(m) * width + ends
