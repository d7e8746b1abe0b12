"""What speaks: the transformer, its KV cache, sampling, packing, randomness, several processes."""
