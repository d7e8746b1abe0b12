"""The one door to the heavy operations. For now each is its torch reference; callers need not know."""

from kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_stats

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_stats"]
