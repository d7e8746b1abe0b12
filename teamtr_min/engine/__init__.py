"""What speaks: the transformer, its KV cache, sampling, packing, LoRA, randomness."""
