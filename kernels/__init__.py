"""The one door to the heavy operations: Triton on CUDA, the torch reference elsewhere.

TEAMTR_KERNELS=auto|triton|torch chooses; TRITON_INTERPRET=1 runs the kernels themselves on a CPU, slowly.
"""

import warnings

# `python -m kernels.linear_logprob` imports this package first, and is warned that it did.
warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning, module="runpy")

from kernels.launch import use_triton  # noqa: E402
from kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_stats  # noqa: E402
from kernels.trust_region import trust_region_loss  # noqa: E402

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_stats", "trust_region_loss", "use_triton"]
