"""The heavy operations in Triton, each with its plain torch reference.

TEAMTR_KERNELS=auto|triton|torch says which runs. TRITON_INTERPRET=1 runs the kernels on a CPU, slowly.
"""

from kernels.launch import use_triton
from kernels.linear_logprob import linear_logprob, linear_logprob_stats
from kernels.trust_region import trust_region_loss

__all__ = ["linear_logprob", "linear_logprob_stats", "trust_region_loss", "use_triton"]
