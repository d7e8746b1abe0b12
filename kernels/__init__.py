"""The one door to the heavy operations: Triton on CUDA, the torch reference elsewhere (TEAMTR_KERNELS)."""

from kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_stats

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_stats"]
