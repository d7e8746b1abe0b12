"""The heavy operations in Triton.

linear_logprob holds its plain torch reference too, and takes it where Triton cannot run. trust_region_loss is
the kernel alone: its definition, and the choice between the two, are in teamtr_min.objective.
TEAMTR_KERNELS=auto|triton|torch chooses; TRITON_INTERPRET=1 runs the kernels themselves on a CPU, slowly.
"""

from kernels.launch import use_triton
from kernels.linear_logprob import TokenStats, linear_logprob, linear_logprob_stats
from kernels.trust_region import trust_region_loss

__all__ = ["TokenStats", "linear_logprob", "linear_logprob_stats", "trust_region_loss", "use_triton"]
